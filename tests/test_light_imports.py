"""Who labels trees must not pay for what trains ResNets."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import jaxft

LIGHT = [
    "labels", "stages", "stage_plan", "methods", "optim.optimizers", "optim.schedules",
    "optim.carry", "optim.plateau", "optim.gradients",
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


def test_importing_jaxft_imports_no_jax():
    """The `jaxft` program handles signals before jax is imported."""
    assert imported("import sys, jaxft; print(*sys.modules)") & {"jax", "numpy", "optax"} == set()


def test_public_names_are_imported_on_first_use():
    assert set(jaxft.__all__) <= set(dir(jaxft))
    for name in jaxft.__all__:
        assert getattr(jaxft, name) is not None


def test_public_names_are_those_of_the_type_checker():
    """The imports under TYPE_CHECKING, the table of modules and `__all__` agree."""
    tree = ast.parse(Path(jaxft.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    homes = {alias.name: statement.module for statement in block.body for alias in statement.names}
    assert sorted(jaxft.__all__) == sorted(homes)
    for name, module in homes.items():
        path = f"{module}.{name}"
        expected = sys.modules.get(path) or getattr(import_module(module), name)
        assert getattr(jaxft, name) is expected, name


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
