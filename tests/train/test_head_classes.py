"""`head_classes`: outputs of a kept or forked head follow the classes of the images."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxft import Adam, Recipe, Stage, WeightsError, data, finetune
from jaxft.report.console import Console

pytestmark = pytest.mark.usefixtures("stage_ends_only")

QUIET = Console(quiet=True)
RECIPE = Recipe(
    model="cifar_resnet8",
    data="drawn",
    optimizer=Adam(),
    batch_size=4,
    augment="none",
    image_size=8,
    resize_size=8,
    stages=(
        Stage("head", {"fc": 1e-2}, 1, restore="last"),
        Stage("on", {"fc": 1e-2}, 1, carry="keep", restore="last"),
    ),
)
NAMES = {False: ("ant", "bee", "wasp"), True: ("ant", "bee")}


def images(classes, order=None):
    """Returns the same images for any order of the classes."""
    order = order or classes
    rng = np.random.default_rng(0)
    targets = np.arange(8) % len(classes)
    pixels = rng.integers(0, 156, (8, 8, 8, 3)) + 40 * targets[:, None, None, None]
    at = np.array([order.index(name) for name in classes])
    source = data.arrays(pixels.astype(np.uint8), at[targets], classes=order)
    return data.Splits(source, source)


@pytest.fixture(scope="module", params=[False, True], ids=["softmax", "binary"])
def run(stage_ends_only, request, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    recipe = dataclasses.replace(RECIPE, binary=request.param)
    finetune(recipe, workdir, data=images(NAMES[recipe.binary]), console=QUIET)
    return workdir, recipe


def tensors(workdir):
    return load_file(workdir / "model.safetensors")


@pytest.mark.slow
def test_fork_on_reordered_classes_reorders_outputs(run, tmp_path, capsys):
    """Reorders parameters, and moments, which the next stage carries."""
    workdir, recipe = run
    names = NAMES[recipe.binary]
    turned = names[1:] + names[:1]
    finetune(recipe, tmp_path / "fork", data=images(names, turned), fork_from=workdir, stage="head")
    assert (
        capsys.readouterr().out.replace("\n", " ").count("has the images' classes in another") == 1
    )
    assert json.loads((tmp_path / "fork/model.json").read_text())["classes"] == [*turned]
    before, after = tensors(workdir), tensors(tmp_path / "fork")
    for name, array in before.items():
        if name.startswith("fc."):
            array = -array if recipe.binary else array[[names.index(name) for name in turned]]
        np.testing.assert_allclose(after[name], array, rtol=2e-4, atol=1e-6)


@pytest.mark.slow
def test_fork_on_other_classes_is_refused(run, tmp_path):
    workdir, recipe = run
    other = images((*NAMES[recipe.binary][:-1], "cicada"))
    with pytest.raises(WeightsError, match=r"other classes.*\n.*ant, bee.*\n.*cicada.*\n.*fork"):
        finetune(recipe, tmp_path / "f", data=other, fork_from=workdir, stage="head", console=QUIET)
    assert not (tmp_path / "f").exists()
    ignoring = dataclasses.replace(recipe, head_classes="ignore")
    finetune(ignoring, tmp_path / "f", data=other, fork_from=workdir, stage="head", console=QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["run", "file", "checkpoint"])
def test_kept_head_must_have_the_classes_of_the_images(source, run, tmp_path):
    workdir, recipe = run
    places = {
        "run": workdir,
        "file": workdir / "model.safetensors",
        "checkpoint": workdir / "checkpoints/4",
    }
    keeping = dataclasses.replace(recipe, weights=str(places[source]), head="keep")
    other = images((*NAMES[recipe.binary][:-1], "cicada"))
    with pytest.raises(WeightsError, match=r"other classes.*\n.*ant, bee.*\n.*cicada"):
        finetune(keeping, tmp_path / "kept", data=other, console=QUIET)
    assert not (tmp_path / "kept").exists()


@pytest.mark.slow
def test_kept_head_is_reordered_to_the_images(run, tmp_path, capsys):
    """Its score at the start equals that of its own run."""
    workdir, recipe = run
    names = NAMES[recipe.binary]
    keeping = dataclasses.replace(
        recipe, weights=str(workdir), head="keep", stages=recipe.stages[:1]
    )
    finetune(keeping, tmp_path / "kept", data=images(names, names[::-1]))
    said = capsys.readouterr().out
    assert said.replace("\n", " ").count("has the images' classes in another order") == 1
    score = json.loads((workdir / "model.json").read_text())["score"]
    (start,) = (line.split() for line in said.splitlines() if line.strip().startswith("start"))
    assert start[2:4] == [f"{score['loss']:.4f}", f"{score['accuracy']:.4f}"]
