"""Who labels trees must not pay for what trains ResNets."""

import subprocess
import sys

import pytest

import jaxft

LIGHT = [
    "labels", "stages", "schedules", "optim", "groups", "carryover", "plateau", "gradients",
    "methods",
]  # fmt: skip
HEAVY = {
    "flax", "orbax", "tensorflow", "tensorflow_datasets", "torch", "sklearn", "PIL",
    "rich", "pydantic", "tyro", "haiku", "equinox",
}  # fmt: skip


def test_the_light_modules_import_jax_and_optax_alone():
    code = "; ".join(["import sys, jaxft", *(f"import jaxft.{name}" for name in LIGHT)])
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    roots = {name.split(".")[0] for name in done.stdout.split()}
    assert {"jax", "optax"} <= roots
    assert roots & HEAVY == set()


def test_the_rest_comes_when_asked_for():
    assert set(jaxft.__all__) <= set(dir(jaxft))
    for name in jaxft.__all__:
        assert getattr(jaxft, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'jaxft' has no attribute 'finetunes'"):
        _ = jaxft.finetunes


def test_torch_is_kept_out_of_child_processes_alone():
    """Had pytest collected `no_torch` as a module with doctests, no test would find torch."""
    assert "no_torch" not in sys.modules
