"""A recipe that names the factory of a network: `model="my_module:build"`."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft import ModelError, Recipe, RecipeError, Stage, finetune, models
from jaxft.recipe_file import read, resolve
from jaxft.report.console import Console
from jaxft.train.export import export

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
    """Has a module of a name of its own, which a process imports once, and a recipe beside it."""
    module = "".join(c for c in request.node.name if c.isalnum())
    (tmp_path / f"{module}.py").write_text(MODULE)
    (tmp_path / "that.py").write_text(RECIPE.format(module=module))
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path, module


def command(script, *arguments, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / script, *arguments],
        cwd=cwd, env=env, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_factory_serves_the_command_line_resume_and_export(folder, tmp_path_factory, monkeypatch):
    here, module = folder
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    code, said = command("finetune.py", here / "that.py", "--workdir", "run", cwd=elsewhere)
    assert code == 0, said
    run = elsewhere / "run"
    assert read(run / "recipe.yaml").model == f"{module}:build"
    assert json.loads((run / "model.json").read_text())["model"] == f"{module}:build"
    weights = (run / "model.safetensors").read_bytes()
    monkeypatch.chdir(here)
    again = finetune(read(run / "recipe.yaml"), run, console=QUIET)
    assert again.weights.read_bytes() == weights
    path, score = export(run, here / "out", platforms=("cpu",))
    assert (path.read_bytes(), score) == (weights, again.score)
    code, said = command("export.py", run, cwd=elsewhere)
    assert code == 1
    assert f"there is no module '{module}'" in said
    assert "name its folder in PYTHONPATH" in said
    assert "Traceback" not in said


def test_factory_beside_a_recipe_is_found(folder):
    here, _ = folder
    model = read(here / "that.py").network(4)
    assert (model.num_classes, model.name) == (4, "Net")


WRONG = {
    "no module": ("nowhere_at_all:build", "there is no module 'nowhere_at_all'. It is searched"),
    "no function": ("{}:biuld", r".py has no 'biuld'"),
    "no call": ("{}:number", "that is no function but a int"),
    "no name": ("{}:", "a factory is written MODULE:FUNCTION"),
    "a path": ("./{}.py:build", "a factory is written MODULE:FUNCTION"),
    "a module of Flax": ("{}:bare", r"returned Net, which is no network yet: .*models.Linen\("),
    "an error within": ("{}:broken", r"broken\(5\) fails: OSError: no file \(.*.py:\d+\)"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "message"), WRONG.values(), ids=WRONG)
def test_factory_that_fails_is_one_error(name, message, folder):
    here, module = folder
    recipe = dataclasses.replace(read(here / "that.py"), model=name.format(module))
    with pytest.raises(ModelError, match=message):
        finetune(recipe, here / "run", console=QUIET)
    assert not (here / "run").exists()


def test_factory_whose_import_fails_is_named(folder):
    here, module = folder
    (here / f"{module}x.py").write_text("import torhc\n")
    recipe = dataclasses.replace(read(here / "that.py"), model=f"{module}x:build")
    with pytest.raises(ModelError, match=r"No module named 'torhc' \(.*x.py:1\)"):
        recipe.network(2)


def test_factory_goes_without_fields_of_registry_networks(folder):
    here, _ = folder
    recipe = dataclasses.replace(read(here / "that.py"), dropout=0.5)
    with pytest.raises(RecipeError, match="dropout shape jaxft's own networks"):
        finetune(recipe, here / "run", console=QUIET)
    assert resolve(read(here / "that.py")) == read(here / "that.py")


def test_module_for_a_network_is_one_error(tmp_path):
    recipe = Recipe(model="net", data="digits", stages=(Stage("all", {"*": 1e-3}, 1),))
    with pytest.raises(ModelError, match="model is the class Linen, which is no network yet"):
        finetune(recipe, tmp_path / "run", model=models.Linen, console=QUIET)


def test_network_by_hand_that_lacks_a_member_is_refused_before_training(tmp_path):
    recipe = Recipe(model="net", data="digits", stages=(Stage("all", {"*": 1e-3}, 1),))
    whole = models.create("cifar_resnet8", num_classes=10)
    members = ("blocks", "block_patterns", "head", "num_classes", "name", "torch_named")
    fields = {name: getattr(whole, name) for name in (*members, "init", "apply")}
    with pytest.raises(ModelError, match=r"model is a ByHand, which has no options: see"):
        finetune(recipe, tmp_path / "run", model=type("ByHand", (), fields)(), console=QUIET)


def test_name_of_a_network_that_was_given_says_how_to_give_it_again():
    with pytest.raises(
        RecipeError, match=r"(?s)no model is called 'cnn'.*names its factory, model='my_"
    ):
        models.create("cnn")
