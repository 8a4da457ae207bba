"""Exported programs: every platform, any batch size, without jaxft."""

import datetime
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.data import Preprocessing
from jaxft.models import create
from jaxft.models.networks.resnet import ResNet, ResNetConfig
from jaxft.models.nnx_adapter import NNXModel
from jaxft.weights.jax_export import PLATFORMS, lifetime, serialize

PREPROCESSING = Preprocessing(image_size=32)
RUN_PROGRAM = """
import pathlib, sys
import jax, numpy as np

program = jax.export.deserialize(pathlib.Path(sys.argv[1]).read_bytes())
assert not [name for name in sys.modules if name.split(".")[0] in ("jaxft", "flax")]
np.save(sys.argv[3], program.call(np.load(sys.argv[2])))
"""


# Grouped convolutions have another implementation on CPU.
GROUPED = ResNetConfig("imagenet", (1, 1), bottleneck=True, groups=8, base_width=8, num_classes=5)
NETWORKS = {
    "plain": create("cifar_resnet8", num_classes=5),
    "grouped": NNXModel("grouped", ResNet, GROUPED),
    "vit": create("vit_tiny_patch16_224", num_classes=5, depth=1, image_size=32),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)
def test_serialized_program_gives_the_same_logits_without_jaxft(model, tmp_path):
    params, stats = jax.jit(model.init)(jax.random.key(0))
    stats = jax.tree.map(lambda x: x + 0.5, stats)
    (tmp_path / "program").write_bytes(serialize(model, params, stats, PREPROCESSING))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    arguments = [tmp_path / file for file in ("program", "images.npy", "logits.npy")]
    subprocess.run([sys.executable, "-c", RUN_PROGRAM, *arguments], check=True)

    @jax.jit
    def logits(params, stats, images):
        inputs = PREPROCESSING.normalize(images)
        return model.apply(params, stats, inputs, norms="running")[0]

    expected = logits(params, stats, images)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), expected, atol=1e-6 * scale)


@pytest.mark.slow
def test_serialized_program_runs_on_every_platform_and_batch_size():
    model = create("cifar_resnet8", num_classes=5, dtype="bfloat16")
    content = serialize(model, *model.init(jax.random.key(0)), PREPROCESSING)
    program = jax.export.deserialize(content)
    assert program.platforms == PLATFORMS
    assert [str(x) for x in program.in_avals[0].shape] == ["b", "32", "32", "3"]
    for batch in (1, 4):
        logits = program.call(np.zeros((batch, 32, 32, 3), np.uint8))
        assert (logits.shape, logits.dtype) == ((batch, 5), jnp.float32)


@pytest.mark.parametrize(
    ("written", "until"),
    [("2026-01-15", "2026-07-15"), ("2026-08-31", "2027-02-28"), ("2026-06-30", "2026-12-30")],
)
def test_lifetime_is_six_months(written, until):
    assert lifetime(datetime.date.fromisoformat(written)) == {
        "jax": jax.__version__,
        "written": written,
        "good_until": until,
    }
