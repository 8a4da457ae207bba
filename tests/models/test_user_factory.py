"""Recipes that name the factory of their network: `model="my_module:build"`."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft import ModelError, Recipe, RecipeError, Stage, finetune, models
from jaxft.export import export
from jaxft.recipe_file import read, resolve
from jaxft.report.console import Console

ROOT = Path(__file__).parents[2]
QUIET = Console(quiet=True)
MODULE = """
from flax import linen as nn
from jaxft import models


class Net(nn.Module):
    classes: int

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.classes, name="head")(nn.relu(nn.Dense(4)(x.mean((1, 2)))))


def build(num_classes):
    return models.Linen(Net(num_classes), shape=(8, 8, 3), head="head")


def bare(num_classes):
    return Net(num_classes)


def broken(num_classes):
    raise OSError("no file")


number = 3
"""
RECIPE = """
from jaxft import Recipe, Stage

recipe = Recipe(
    model="{module}:build", data="digits:5-9", shots=2, image_size=8, resize_size=8, augment="none",
    stages=(Stage("head", {{"head": 1e-2}}, epochs=1), Stage("all", {{"*": 1e-3}}, epochs=1)),
)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch, request):
    """A folder with a module, whose name is unique in the process, and a recipe that names it."""
    module = "".join(c for c in request.node.name if c.isalnum())
    (tmp_path / f"{module}.py").write_text(MODULE)
    (tmp_path / "that.py").write_text(RECIPE.format(module=module))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path, module


def command(script, *arguments, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *arguments],
        cwd=cwd, env=env, capture_output=True, text=True,
    )  # fmt: skip
    return process.returncode, process.stdout + process.stderr


@pytest.mark.slow
def test_factory_on_the_command_line_in_resume_and_export(folder, tmp_path_factory, monkeypatch):
    recipe_folder, module = folder
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    code, output = command(
        "finetune.py", recipe_folder / "that.py", "--workdir", "run", cwd=elsewhere
    )
    assert code == 0, output
    run = elsewhere / "run"
    assert read(run / "recipe.yaml").model == f"{module}:build"
    assert json.loads((run / "model.json").read_text())["model"] == f"{module}:build"
    weights = (run / "model.safetensors").read_bytes()
    monkeypatch.chdir(recipe_folder)
    resumed = finetune(read(run / "recipe.yaml"), run, console=QUIET)
    assert resumed.weights.read_bytes() == weights
    path, score = export(run, recipe_folder / "out", platforms=("cpu",))
    assert (path.read_bytes(), score) == (weights, resumed.score)
    code, output = command("export.py", run, cwd=elsewhere)
    assert code == 1
    assert f"there is no module '{module}'" in output
    assert "add its folder to PYTHONPATH" in output
    assert "Traceback" not in output


def test_factory_is_found_in_the_recipes_folder(folder):
    recipe_folder, _ = folder
    model = read(recipe_folder / "that.py").network(4)
    assert (model.num_classes, model.name) == (4, "Net")


FAILURES = {
    "unknown module": (
        "nowhere_at_all:build",
        "there is no module 'nowhere_at_all'. It is searched",
    ),
    "unknown function": ("{}:biuld", r".py has no 'biuld'"),
    "not callable": ("{}:number", "is not a function but of type int"),
    "no function name": ("{}:", "it is written MODULE:FUNCTION"),
    "file path": ("./{}.py:build", "it is written MODULE:FUNCTION"),
    "unwrapped Flax module": (
        "{}:bare",
        r"returned Net, which is not a jaxft network: .*models.Linen\(",
    ),
    "factory that raises": ("{}:broken", r"broken\(5\) fails: OSError: no file \(.*.py:\d+\)"),
}


@pytest.mark.parametrize(("name", "message"), FAILURES.values(), ids=FAILURES)
def test_factory_failure_is_a_model_error(name, message, folder):
    recipe_folder, module = folder
    recipe = dataclasses.replace(read(recipe_folder / "that.py"), model=name.format(module))
    with pytest.raises(ModelError, match=message):
        finetune(recipe, recipe_folder / "run", console=QUIET)
    assert not (recipe_folder / "run").exists()


def test_factory_import_error_is_reported(folder):
    recipe_folder, module = folder
    (recipe_folder / f"{module}x.py").write_text("import torhc\n")
    recipe = dataclasses.replace(read(recipe_folder / "that.py"), model=f"{module}x:build")
    with pytest.raises(ModelError, match=r"No module named 'torhc' \(.*x.py:1\)"):
        recipe.network(2)


def test_factory_rejects_options_of_registry_networks(folder):
    recipe_folder, _ = folder
    recipe = dataclasses.replace(read(recipe_folder / "that.py"), dropout=0.5)
    with pytest.raises(RecipeError, match="dropout shape jaxft's own networks"):
        finetune(recipe, recipe_folder / "run", console=QUIET)
    assert resolve(read(recipe_folder / "that.py")) == read(recipe_folder / "that.py")


def test_model_argument_rejects_a_class(tmp_path):
    recipe = Recipe(model="net", data="digits", stages=(Stage("all", {"*": 1e-3}, 1),))
    with pytest.raises(ModelError, match="model is the class Linen, which is not a jaxft network"):
        finetune(recipe, tmp_path / "run", model=models.Linen, console=QUIET)


def test_model_argument_without_a_protocol_member_is_rejected(tmp_path):
    recipe = Recipe(model="net", data="digits", stages=(Stage("all", {"*": 1e-3}, 1),))
    complete = models.create("cifar_resnet8", num_classes=10)
    members = ("blocks", "block_patterns", "head", "num_classes", "name", "key_map")
    fields = {name: getattr(complete, name) for name in (*members, "init", "apply")}
    with pytest.raises(ModelError, match=r"model is a Incomplete, which has no options: see"):
        finetune(recipe, tmp_path / "run", model=type("Incomplete", (), fields)(), console=QUIET)


def test_create_with_unknown_name_explains_user_networks():
    with pytest.raises(
        RecipeError, match=r"(?s)no model is called 'cnn'.*builds it in the recipe: model='my_"
    ):
        models.create("cnn")
