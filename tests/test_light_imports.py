"""What `import jaxft` loads, and the names that it exports."""

import ast
import importlib.metadata
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import jaxft

LIGHT = [
    "patterns", "tree_paths", "labels", "nnx_filter", "stacked_layers", "stages", "stage_options",
    "stage_plan", "early_stopping", "strategies", "anchor", "linear_probe", "optim.optimizers",
    "optim.transform", "optim.schedules", "optim.carry", "optim.plateau", "optim.gradients",
    "optim.carry_report", "optim.memory", "optim.group_trees", "optim.complete_optimizer",
    "state_shapes",
]  # fmt: skip
HEAVY = {
    "flax", "orbax", "tensorflow", "tensorflow_datasets", "torch", "sklearn", "PIL",
    "rich", "pydantic", "tyro", "haiku", "equinox",
}  # fmt: skip


def imported_packages(code):
    """Runs code that prints module names; returns their top-level packages."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.split()}


def test_light_modules_import_only_jax_and_optax():
    code = "; ".join(["import sys, jaxft", *(f"import jaxft.{name}" for name in LIGHT)])
    packages = imported_packages(f"{code}; print(*sys.modules)")
    assert {"jax", "optax"} <= packages
    assert packages & HEAVY == set()


def test_importing_jaxft_imports_no_jax():
    """The `jaxft` program handles signals before jax is imported."""
    code = "import sys, jaxft; print(*sys.modules)"
    assert imported_packages(code) & {"jax", "numpy", "optax"} == set()


def test_exported_names_are_those_of_the_type_checker():
    """The imports under TYPE_CHECKING, the table of modules and `__all__` agree."""
    tree = ast.parse(Path(jaxft.__file__).read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [statement for statement in block.body if isinstance(statement, ast.ImportFrom)]
    homes = {alias.name: statement.module for statement in imports for alias in statement.names}
    assert sorted(jaxft.__all__) == sorted(homes)
    for name, module in homes.items():
        value = getattr(jaxft, name)  # imports it
        expected = sys.modules.get(f"{module}.{name}") or getattr(import_module(module), name)
        assert value is expected, name


def test_exported_names_exist():
    assert set(jaxft.__all__) <= set(dir(jaxft))
    assert {*jaxft._MODULES, *jaxft._SUBMODULES} == set(jaxft.__all__)
    for name in jaxft.__all__:
        assert getattr(jaxft, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'jaxft' has no attribute 'finetunes'"):
        _ = jaxft.finetunes


def test_version_is_that_of_the_distribution():
    assert jaxft.__version__ == importlib.metadata.version("jaxft")


def test_types_are_exported():
    assert (Path(jaxft.__file__).parent / "py.typed").is_file()


@pytest.mark.parametrize("name", [name for name in jaxft.__all__ if name.endswith("Error")])
def test_errors_of_input_are_value_errors(name):
    error = getattr(jaxft, name)
    assert issubclass(error, jaxft.JaxftError)
    runtime = {"JaxftError", "CheckpointError", "NonFiniteError", "InterruptedRunError"}
    assert issubclass(error, ValueError) == (name not in runtime | {"ParallelError"})


def test_tensorboard_writer_does_not_import_torch(tmp_path):
    """tensorboardX imports torch where it can."""
    code = (
        "import sys; from etils import epath; from jaxft.report.tensorboard import EventFile; "
        f"EventFile(epath.Path({str(tmp_path)!r}), purge_step=1); print(*sys.modules)"
    )
    assert imported_packages(code) & {"tensorboardX", "torch"} == {"tensorboardX"}
