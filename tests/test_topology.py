"""TPU slices and GPUs by name, and programs compiled for them without the chips."""

import os
from importlib.util import find_spec

import jax
import numpy as np
import pytest

from jaxft import ParallelError
from jaxft.topology import CHIPS, Topology

needs_libtpu = pytest.mark.skipif(not find_spec("libtpu"), reason="libtpu is not installed")


@pytest.mark.parametrize(
    ("name", "label", "chip", "chips", "slices"),
    [
        ("v5e-8", "v5e-8", "v5e", 8, 1),
        ("v5litepod-16", "v5e-16", "v5e", 16, 1),
        ("v4-32", "v4-32", "v4", 16, 1),
        ("v5p-8", "v5p-8", "v5p", 4, 1),
        ("v6e-256", "v6e-256", "v6e", 256, 1),
        ("2xv5e-16", "2xv5e-16", "v5e", 32, 2),
        ("2 x v5e-16", "2xv5e-16", "v5e", 32, 2),
        ("h100-8", "h100-8", "h100", 8, 1),
        ("a100-16", "a100-16", "a100", 16, 1),
        ("h200-1", "h200-1", "h200", 1, 1),
    ],
)
def test_topology_parse(name, label, chip, chips, slices):
    assert Topology.parse(name) == Topology(label, CHIPS[chip], chips, slices)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e", "'v5e' is no topology. Write the chip and the size of the slice, such as v5e-8"),
        ("b200-8", "the chips are v4, v5e, v5p, v6e, a100, h100, h200"),
        ("h100-3", "there is no slice 'h100-3'; there are h100-1, h100-2, h100-4, h100-8, h100-16"),
        ("2xh100-8", "there is no slice '2xh100-8'; there are h100-1"),
        ("", "'' is no topology"),
        ("v5e-7", "there is no slice 'v5e-7'; there are v5e-1, v5e-4, v5e-8"),
        ("v4-9", "there is no slice 'v4-9'; there are v4-8, v4-16"),
    ],
)
def test_topology_parse_error(name, message):
    with pytest.raises(ParallelError, match=message):
        Topology.parse(name)


@pytest.mark.parametrize(
    ("name", "module", "message"),
    [
        ("v5e-8", "topology", r"v5e-8 needs libtpu: pip install 'jaxft\[tpu\]'"),
        ("h100-8", "gpu_target", r"h100-8 needs .* CUDA: pip install 'jaxft\[cuda\]'"),
    ],
)
def test_topology_without_its_compiler_names_the_extra(name, module, message, monkeypatch):
    monkeypatch.setattr(f"jaxft.{module}.find_spec", lambda name: None)
    with pytest.raises(ParallelError, match=message):
        Topology.parse(name).devices()


def test_topology_of_gpus_with_unfit_plugin(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("topology not implemented for cuda")

    monkeypatch.setattr("jaxft.gpu_target.find_spec", lambda name: True)
    monkeypatch.setattr("jaxft.gpu_target.topologies.get_topology_desc", refuse)
    with pytest.raises(ParallelError, match="cannot compile for h100-8: topology not implemented"):
        Topology.parse("h100-8").devices()


@pytest.mark.parametrize(
    ("chip", "dtype", "precision", "tflops"),
    [
        ("v5e", "bfloat16", "highest", 197),
        ("v5e", "float32", "default", 197),
        ("v5e", "float32", "high", 197 / 3),
        ("v5e", None, "highest", 197 / 6),
        ("h100", "bfloat16", "default", 989.4),
        ("h100", "float32", "default", 494.7),
        ("h100", "float32", "highest", 66.9),
    ],
)
def test_chip_peak(chip, dtype, precision, tflops):
    assert CHIPS[chip].peak(dtype, precision) == pytest.approx(tflops * 1e12)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e-8", "v4-8", "v6e-8", "v5p-8", "2xv5e-16"])
def test_topology_devices(name):
    topology = Topology.parse(name)
    assert len(topology.devices()) == topology.chips


@needs_libtpu
def test_devices_of_topology_lower_for_tpu():
    devices = Topology.parse("v5e-4").devices()
    x = devices.abstract_batch(jax.ShapeDtypeStruct((8,), np.float32))
    function = jax.jit(
        lambda x: jax.lax.platform_dependent(x, tpu=jax.lax.sin, default=jax.lax.cos)
    )
    text = devices.lower(function, x).as_text()
    assert ("stablehlo.sine" in text, "stablehlo.cosine" in text) == (True, False)


@needs_libtpu
def test_topology_devices_restore_environment(monkeypatch):
    """Variables that the user has set stay as they are."""
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    before = dict(os.environ)
    Topology.parse("v5e-4").devices()
    assert dict(os.environ) == before
