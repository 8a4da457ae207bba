"""Who labels trees must not pay for what trains ResNets."""

import subprocess
import sys

import pytest

import jaxft

LIGHT = [
    "patterns", "labels", "stages", "stage_plan", "methods", "optim.optimizers", "optim.schedules",
    "optim.carry", "optim.plateau", "optim.gradients", "optim.transform", "early_stopping",
]  # fmt: skip
HEAVY = {
    "flax", "orbax", "tensorflow", "tensorflow_datasets", "torch", "sklearn", "PIL",
    "rich", "pydantic", "tyro", "haiku", "equinox",
}  # fmt: skip


def imported(code):
    """The packages of the modules that it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_the_light_modules_import_jax_and_optax_alone():
    code = "; ".join(["import sys, jaxft", *(f"import jaxft.{name}" for name in LIGHT)])
    roots = imported(f"{code}; print(*sys.modules)")
    assert {"jax", "optax"} <= roots
    assert roots & HEAVY == set()


def test_the_rest_comes_when_asked_for():
    assert set(jaxft.__all__) <= set(dir(jaxft))
    for name in jaxft.__all__:
        assert getattr(jaxft, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'jaxft' has no attribute 'finetunes'"):
        _ = jaxft.finetunes


def test_records_for_tensorboard_need_no_torch(tmp_path):
    """Which tensorboardX imports where it can."""
    code = (
        "import sys; from etils import epath; from jaxft.report.tensorboard import EventFile; "
        f"EventFile(epath.Path({str(tmp_path)!r}), purge_step=1); print(*sys.modules)"
    )
    assert {"tensorboardX"} == imported(code) & {"tensorboardX", "torch"}
