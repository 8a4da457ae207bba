"""Runs whose stages end with `WiSE`: the average, its choice, resume, EMA, cached features."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from faults import before
from flax import linen as nn
from mortal import QUIET, assert_same_end, killed, rows, steps, terminated
from safetensors.numpy import load_file

from jaxft import (
    Adam,
    CheckpointError,
    InterruptedRunError,
    Recipe,
    Stage,
    WiSE,
    data,
    finetune,
    models,
)
from jaxft.checkpoint.weights_only import read_weights

pytestmark = pytest.mark.usefixtures("shared_programs")

RNG = np.random.default_rng(0)
TARGETS = np.arange(40) % 2
PIXELS = RNG.integers(0, 200, (40, 8, 8, 3), np.uint8) + 25 * TARGETS[:, None, None, None]
IMAGES = data.arrays(PIXELS.astype(np.uint8), TARGETS, classes=["a", "b"])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Dense(8, name="early")(x))
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x)
        return nn.Dense(2, name="head")(nn.relu(nn.Dense(8, name="late")(x)).mean((1, 2)))


NETWORK = models.Linen(Net(), shape=(8, 8, 3), head="head")
LATE = Stage("late", {"head": 1e-2, "late": 1e-2}, epochs=3, restore="last", finish=WiSE())
NORM = dataclasses.replace(LATE, train={**LATE.train, "norm": 1e-2})
# Stages end at steps 3, 12 and 21.
RECIPE = Recipe(
    model="net",
    data="noise",
    optimizer=Adam(),
    train_split="train[:24]",
    val_split="train[24:]",
    image_size=8,
    resize_size=8,
    batch_size=9,
    augment="none",
    stages=(
        Stage("head", {"head": 1e-2}, epochs=1, restore="last", finish=WiSE((0.5,))),
        NORM,
        dataclasses.replace(NORM, name="more", carry="keep", ema=0.5),
    ),
)


def run(workdir, *stages, **changes):
    recipe = dataclasses.replace(RECIPE, stages=stages or RECIPE.stages, **changes)
    return finetune(recipe, workdir, data=IMAGES, model=NETWORK, console=QUIET)


def ends(workdir):
    """Returns `(params, stats)` at the end of each stage."""
    last = {row["stage"]: row["step"] for row in rows(workdir)}
    return [read_weights(workdir / "checkpoints" / str(step)) for step in last.values()]


def curve(workdir, stage):
    (found,) = (row["wise"] for row in rows(workdir) if row["stage"] == stage and "wise" in row)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole") / "run"
    run(workdir)
    return workdir


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Two stages without an average."""
    workdir = tmp_path_factory.mktemp("plain") / "run"
    run(workdir, Stage("head", {"head": 1e-2}, 1), dataclasses.replace(LATE, finish=None))
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_wise_averages_start_and_end_of_the_stage(alpha, plain, tmp_path):
    """With running statistics; the frozen parameters are bit-identical."""
    late = dataclasses.replace(LATE, finish=WiSE((alpha,)))
    result = run(tmp_path / "run", Stage("head", {"head": 1e-2}, 1), late)
    (start, stats), (end, _) = ends(plain)
    found, found_stats = ends(tmp_path / "run")[-1]
    for name in ("head", "late"):
        for x, y, averaged in zip(
            *(jax.tree.leaves(tree[name]) for tree in (start, end, found)), strict=True
        ):
            expected = (1 - alpha) * x.astype(np.float64) + alpha * y
            tolerance = 1e-7 if alpha == 0.25 else 0
            np.testing.assert_allclose(averaged, expected, rtol=tolerance, atol=tolerance)
    for name in ("early", "norm"):
        jax.tree.map(np.testing.assert_array_equal, found[name], start[name])
    jax.tree.map(np.testing.assert_array_equal, found_stats, stats)
    assert curve(tmp_path / "run", "late")["alpha"] == alpha
    assert result.score.accuracy == curve(tmp_path / "run", "late")["val_accuracy"][str(alpha)]


@pytest.mark.slow
def test_wise_keeps_the_best_of_its_averages(whole):
    """The next stage, the weights and their score are of it; ties go to the larger alpha."""
    described = json.loads((whole / "model.json").read_text())
    for stage in ("late", "more"):
        found = curve(whole, stage)
        accuracies = {float(alpha): x for alpha, x in found["val_accuracy"].items()}
        assert list(accuracies) == [*WiSE().alphas]
        best = max(accuracies.values())
        assert found["alpha"] == max(alpha for alpha, x in accuracies.items() if x == best)
    end = [row for row in rows(whole) if row["stage"] == "late"][-1]
    assert curve(whole, "late")["val_accuracy"]["1.0"] == end["val_accuracy"]
    chosen = str(curve(whole, "more")["alpha"])
    for name in ("loss", "accuracy"):
        assert described["score"][name] == curve(whole, "more")[f"val_{name}"][chosen]
    late = curve(whole, "late")
    more_start = curve(whole, "more")["val_loss"]["0.0"]
    assert more_start == late["val_loss"][str(late["alpha"])]


@pytest.mark.slow
def test_wise_reestimates_the_statistics_that_its_stage_updates(tmp_path):
    """As `update_bn`: the mean over batches of 9, 9 and 6 images, of what comes before the norm."""
    run(tmp_path, dataclasses.replace(NORM, finish=WiSE((0.5,))))
    ((params, stats),) = ends(tmp_path)
    images = np.asarray(RECIPE.preprocessing.normalize(PIXELS[:24].astype(np.uint8)))
    dense = params["early"]
    x = np.maximum(images @ dense["kernel"] + dense["bias"], 0)
    batches = np.split(x.astype(np.float64), (9, 18))
    for name in ("mean", "var"):
        expected = np.mean([getattr(each, name)((0, 1, 2)) for each in batches], 0)
        np.testing.assert_allclose(stats["norm"][name], expected, rtol=1e-4, err_msg=name)


@pytest.mark.slow
@pytest.mark.smoke
def test_run_killed_while_it_averages_ends_the_same(whole, tmp_path):
    """In the first average of each stage, in a later one, and in the save after it."""
    workdir = tmp_path / "run"
    points = (("average", 0.5), ("save", 3), ("average", 0.9), ("average", 0.2), ("save", 21))
    for point, at in points:
        with killed(point, at):
            run(workdir)
    run(workdir)
    assert_same_end(workdir, whole)


@pytest.mark.slow
def test_killed_average_repeats_no_step(tmp_path):
    with killed("average", 0.5):
        run(tmp_path / "run")
    assert steps(tmp_path / "run") == [3]

    def fail(*_, **__):
        raise AssertionError

    with before("step", fail, at=3), killed("save", 3):
        run(tmp_path / "run")


@pytest.mark.slow
def test_signal_stops_averaging(whole, tmp_path):
    with terminated("average", 0.7), pytest.raises(InterruptedRunError, match="step 12 is saved"):
        run(tmp_path / "run")
    run(tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.slow
def test_wise_does_not_depend_on_cached_features(plain, tmp_path):
    """`early` is frozen, and with blocks its features would be cached; see `test_devices.py`."""
    recipe = Recipe(
        model="cifar_resnet8", data="noise", image_size=8, resize_size=8, batch_size=9,
        augment="none", optimizer=Adam(), train_split="train[:24]", val_split="train[24:]",
        stages=(
            Stage("late", {"fc": 1e-2, "layer3": 1e-3}, 2, restore="last", finish=WiSE((0.5,))),
        ),
    )  # fmt: skip
    found = []
    for cache_mib in (64, 0):
        workdir = tmp_path / str(cache_mib)
        cached = dataclasses.replace(recipe, cache_mib=cache_mib)
        finetune(cached, workdir, data=IMAGES, console=QUIET)
        found.append((load_file(workdir / "model.safetensors"), curve(workdir, "late")))
    (first, first_curve), (second, second_curve) = found
    for name, x in first.items():
        np.testing.assert_allclose(x, second[name], rtol=1e-4, atol=1e-5, err_msg=name)
    loss = first_curve["val_loss"]["0.5"]
    assert loss == pytest.approx(second_curve["val_loss"]["0.5"], rel=1e-4)


@pytest.mark.slow
def test_stage_without_improvement_is_not_averaged(tmp_path):
    late = dataclasses.replace(NORM, restore="best", train={"head": 1e-30}, optimizer=Adam())
    run(tmp_path, late)
    assert not any("wise" in row for row in rows(tmp_path))


@pytest.mark.slow
def test_longer_run_drops_the_average(whole, tmp_path):
    """As if it had been that long from the start."""
    shorter = dataclasses.replace(NORM, epochs=2)
    run(tmp_path / "run", RECIPE.stages[0], shorter)
    recipe = dataclasses.replace(RECIPE, stages=RECIPE.stages[:2])
    for folder in ("run", "long"):
        finetune(recipe, tmp_path / folder, data=IMAGES, model=NETWORK, console=QUIET, extend=True)
    assert_same_end(tmp_path / "run", tmp_path / "long")


@pytest.mark.slow
def test_missing_start_of_a_stage_is_an_error(tmp_path):
    with killed("average", 0.9):
        run(tmp_path)
    (tmp_path / "checkpoints" / "3").rename(tmp_path / "elsewhere")
    message = "no checkpoint of the end of stage 'head', with which stage 'late' is to be averaged"
    with pytest.raises(CheckpointError, match=message):
        run(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / "checkpoints" / "3")
    run(tmp_path)
