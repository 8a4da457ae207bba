"""Greedy soup over runs: order, average, statistics, output folder, mistakes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from commands import call
from faults import failing
from flax import linen as nn

from jaxft import (
    Adam,
    CheckpointError,
    Classifier,
    DataError,
    Recipe,
    RecipeError,
    Stage,
    data,
    evaluate,
    finetune,
    models,
    soup,
)
from jaxft.checkpoint.weights_only import read_weights
from jaxft.report.console import Console

pytestmark = pytest.mark.slow

QUIET = Console(quiet=True)
TARGETS = np.arange(48) % 3
PIXELS = np.random.default_rng(0).integers(0, 200, (48, 8, 8, 3), np.uint8)
PIXELS += 25 * TARGETS[:, None, None, None].astype(np.uint8)


def images(pixels=PIXELS, classes=("a", "b", "c")):
    return data.arrays(pixels, TARGETS, classes)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Dense(8, name="early")(x))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="late")(x)).mean((1, 2)))


NETWORK = models.Linen(Net(), shape=(8, 8, 3), head="head")
START = NETWORK.init(jax.random.key(0))
RECIPE = Recipe(
    model="net", data="noise", optimizer=Adam(), train_split="train[:30]",
    val_split="train[30:]", image_size=8, resize_size=8, batch_size=10, augment="shift",
    stages=(Stage("late", {"head": 1e-2, "late": 1e-2, "norm": 1e-2}, 2, restore="last"),),
)  # fmt: skip


def run(workdir, source=None, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    return finetune(
        recipe, workdir, data=source or images(), model=NETWORK, start=START, console=QUIET
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Three runs; the third has an overwhelming learning rate."""
    folder = tmp_path_factory.mktemp("runs")
    for seed in (0, 1):
        run(folder / f"seed{seed}", seed=seed)
    wild = dataclasses.replace(RECIPE.stages[0], train={"early": 50.0, "late": 50.0}, norms="eval")
    run(folder / "wild", stages=(wild,), seed=2)
    return [folder / name for name in ("wild", "seed1", "seed0")]


@pytest.fixture(scope="module")
def cooked(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("soup") / "out"
    return soup(runs, folder, data=images(), model=NETWORK, console=QUIET), folder


def greedy(runs):
    """Returns the names of the kept runs and the accuracy, by `average_of`."""
    alone = {each: average_of([each])[1] for each in runs}
    order = sorted(runs, key=lambda each: (-alone[each].accuracy, alone[each].loss))
    kept, best = order[:1], alone[order[0]]
    for each in order[1:]:
        score = average_of([*kept, each])[1]
        if score.accuracy >= best.accuracy:
            kept, best = [*kept, each], score
    return kept, best


def average_of(runs):
    """Returns the weights of an average in float64, and its evaluation."""
    trees = [read_weights(each / "checkpoints") for each in runs]
    params, stats = jax.tree.map(lambda *x: np.mean(np.float64(x), 0).astype(np.float32), *trees)
    if len(runs) > 1:
        x = np.asarray(RECIPE.preprocessing.normalize(PIXELS[:30]), np.float64)
        x = np.maximum(x @ params["early"]["kernel"] + params["early"]["bias"], 0)
        batches = np.split(x, 3)
        for name in ("mean", "var"):
            means = [getattr(batch, name)((0, 1, 2)) for batch in batches]
            stats["norm"][name] = np.float32(np.mean(means, 0))
    classifier = Classifier(
        NETWORK, params, stats, ("a", "b", "c"), RECIPE.preprocessing, batch_size=10
    )
    val = data.arrays(PIXELS[30:], TARGETS[30:], ["a", "b", "c"])
    return (params, stats), evaluate(classifier, val)


@pytest.mark.smoke
def test_soup_is_the_greedy_average(runs, cooked):
    result, folder = cooked
    kept, best = greedy(runs)
    assert [each.run for each in result.ingredients if each.is_kept] == [*map(str, kept)]
    assert result.score.accuracy == best.accuracy
    assert result.score.loss == pytest.approx(best.loss, rel=1e-4)
    accuracies = [each.score.accuracy for each in result.ingredients]
    assert accuracies == sorted(accuracies, reverse=True)
    found, expected = read_weights(folder / "checkpoints"), average_of(kept)[0]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-6), found, expected
    )


def test_soup_of_seeds_keeps_frozen_parameters(runs, tmp_path):
    result = soup(runs[1:], tmp_path, data=images(), model=NETWORK, console=QUIET)
    found, _ = read_weights(tmp_path / "checkpoints")
    jax.tree.map(np.testing.assert_array_equal, found["early"], START[0]["early"])
    first, *_ = result.ingredients
    assert first.soup_score == first.score
    assert result.score.accuracy >= first.score.accuracy


def test_soup_folder_is_read_as_a_run(cooked):
    result, folder = cooked
    classifier = Classifier.load(folder, model=NETWORK)
    val = data.arrays(PIXELS[30:], TARGETS[30:], ["a", "b", "c"])
    assert evaluate(classifier, val).accuracy == result.score.accuracy
    described = json.loads((folder / "model.json").read_text())
    assert described["score"]["accuracy"] == result.score.accuracy
    assert described["classes"] == ["a", "b", "c"]


def test_soup_command(tmp_path):
    """From images to a soup that evaluate and export take."""
    recipe = dataclasses.replace(
        RECIPE, model="cifar_resnet8", weights="asset:digits_0to4", data="digits:5-9",
        train_split="train[:40]", val_split="train[40:80]",
        stages=(Stage("head", {"fc": 1e-2}, 1, norms="batch"),),
    )  # fmt: skip
    for seed in (0, 1):
        finetune(dataclasses.replace(recipe, seed=seed), tmp_path / f"r{seed}", console=QUIET)
    names = [str(tmp_path / f"r{seed}") for seed in (0, 1)]
    code, out, errors = call("soup", *names, "--workdir", tmp_path / "out")
    assert code == 0, errors
    assert max(map(len, out.splitlines()[:3])) <= 80
    accuracy = json.loads((tmp_path / "out/model.json").read_text())["score"]["accuracy"]
    assert f"{accuracy:.4f}" in out
    code, out, errors = call("evaluate", tmp_path / "out")
    assert code == 0, errors
    assert f"{accuracy:.4f}" in out
    code, out, errors = call("export", tmp_path / "out", "--out", tmp_path / "exported")
    assert code == 0, errors
    assert f"Validation accuracy {accuracy:.4f}" in out


def other_val(runs, tmp_path):
    run(tmp_path / "other", val_split="train[31:]")
    return [runs[1], tmp_path / "other"]


def other_classes(runs, tmp_path):
    run(tmp_path / "other", images(classes=("a", "b", "d")))
    return [runs[1], tmp_path / "other"]


def other_preprocessing(runs, tmp_path):
    run(tmp_path / "other", mean=(0.5, 0.5, 0.5))
    return [runs[1], tmp_path / "other"]


def unfinished(runs, tmp_path):
    with failing("save", InterruptedError, 6), pytest.raises(InterruptedError):
        run(tmp_path / "other")
    return [runs[1], tmp_path / "other"]


MISTAKES = {
    "one run": (lambda runs, _: runs[:1], RecipeError, "at least two runs, each once"),
    "twice": (lambda runs, _: [runs[0], runs[0]], RecipeError, "at least two runs, each once"),
    "no run": (lambda runs, tmp_path: [*runs, tmp_path], CheckpointError, "holds no run"),
    "unfinished": (unfinished, CheckpointError, "has not ended: stage 'late', after epoch 1"),
    "images": (other_val, DataError, "other has validated with other images .*val: 17 images"),
    "classes": (other_classes, DataError, "no longer there: d; new: c"),
    "network": (other_preprocessing, RecipeError, r"cannot be averaged: mean is \(0.5, 0.5, 0.5"),
}


@pytest.mark.parametrize(("prepare", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_soup_reports_mistakes(prepare, error, message, runs, tmp_path):
    folders = prepare(runs, tmp_path)
    with pytest.raises(error, match=f"(?s){message}"):
        soup(folders, tmp_path / "out", data=images(), model=NETWORK, console=QUIET)
    assert not (tmp_path / "out").exists()


def test_soup_does_not_overwrite(runs, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="is not empty; choose another --workdir"):
        soup(runs, tmp_path, data=images(), model=NETWORK, console=QUIET)
