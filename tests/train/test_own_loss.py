"""Runs with other losses than the cross entropy: training, validation, best epoch, errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mortal import ONE_STAGE, QUIET, assert_same_end, killed, train
from safetensors.numpy import load_file

from jaxft import SGD, Focal, LinearProbe, Recipe, RecipeError, Stage, finetune, losses, models
from jaxft.data import Preprocessing, Splits
from jaxft.data.digits import read
from jaxft.report.console import Console

pytestmark = pytest.mark.usefixtures("stage_ends_only")

MODEL = models.create("cifar_resnet8", num_classes=10)
DIGITS = read("0-9")
TRAIN, VAL = DIGITS.take(np.arange(24)), DIGITS.take(np.arange(24, 48))


def softmax_focal(logits, targets):
    """The focal loss of a softmax."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(targets * (1 - jnp.exp(log_p)) ** 2 * log_p, -1)


def mean(logits, targets):
    return softmax_focal(logits, targets).mean()


def run(workdir, *stages, console=QUIET, **fields):
    """Returns the rows and the result of a run from `MODEL.init`."""
    plain = {"augment": "none", "optimizer": SGD(), "batch_size": 24}
    recipe = Recipe(
        model=MODEL.name, data="digits", stages=stages, image_size=8, resize_size=8,
        **plain, **fields,
    )  # fmt: skip
    given = {"data": Splits(TRAIN, VAL), "start": MODEL.init(jax.random.key(1))}
    result = finetune(recipe, workdir, console=console, **given)
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows], result


def logits_at_start(source):
    params, stats = MODEL.init(jax.random.key(1))
    images = Preprocessing(image_size=8, resize_size=8).normalize(source.images)
    return MODEL.apply(params, stats, images, norms="running")[0]


STILL = {"train": {"fc": 1e-30}, "epochs": 1}  # the weights stay those of the start


@pytest.mark.slow
@pytest.mark.parametrize("cache_mib", [512, 0], ids=["cached", "uncached"])
def test_each_stage_trains_and_validates_its_loss(cache_mib, tmp_path, capsys):
    of_stage = {
        "bce": "bce",
        "focal": Focal(1.5, 0.25),
        "own": "test_own_loss:softmax_focal",
        "probe": "cross_entropy",
        "plain": "cross_entropy",
    }
    overrides = {name: {} if name == "bce" else {"loss": loss} for name, loss in of_stage.items()}
    stages = [Stage(name, **STILL, **fields) for name, fields in overrides.items()]
    stages[3] = Stage("probe", {"fc": LinearProbe((1e-7,))}, restore="last")
    settings = {"loss": "bce", "cache_mib": cache_mib, "label_smoothing": 0.1, "balance": "loss"}
    rows, _ = run(tmp_path / "run", *stages, console=Console(), **settings)
    printed = capsys.readouterr().out.splitlines()
    starts = [line.split()[2] for line in printed if line.startswith("  start  ")]
    for row, start in zip(rows[:3], starts[:3], strict=True):
        loss = of_stage[row["stage"]]
        each = losses.example_losses(loss, logits_at_start(VAL), VAL.targets)
        expected = float(each.mean())
        assert row["val_loss"] == pytest.approx(expected, rel=1e-5)
        assert float(start) == pytest.approx(expected, abs=1e-4)
        # Training has smoothed targets and the weights of the classes.
        smoothed = 0.9 * jax.nn.one_hot(TRAIN.targets, 10) + 0.01
        each = losses.example_losses(loss, logits_at_start(TRAIN), smoothed)
        weights = 24 / (10 * np.bincount(TRAIN.targets, minlength=10))
        weights = weights[TRAIN.targets]
        expected = float(np.sum(weights * each) / weights.sum())
        assert row["train_loss"] == pytest.approx(expected, rel=1e-5)
    probe, plain = rows[3:]
    assert starts[4] == f"{probe['val_loss']:.4f}"  # both are cross entropies, of equal weights
    assert plain["val_loss"] == pytest.approx(probe["val_loss"], rel=1e-5)


@pytest.mark.slow
def test_own_loss_that_is_the_cross_entropy_trains_like_it(tmp_path):
    stages = Stage("head", {"fc": 0.05}, 1), Stage("all", {"*": 0.05}, 1)
    settings = {"mixup": 0.3, "label_smoothing": 0.1, "reduction": "sum"}
    runs = {"own": {"loss": "optax:softmax_cross_entropy"}, "plain": {}}
    own, plain = (run(tmp_path / name, *stages, **settings, **runs[name]) for name in runs)
    for ours, theirs in zip(own[0], plain[0], strict=True):
        for name in ("train_loss", "val_loss", "train_accuracy", "val_accuracy", "val_top5"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5), name
    found, expected = (load_file(result.weights) for _, result in (own, plain))
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_best_epoch_by_loss_compares_losses_of_one_stage(tmp_path, capsys):
    """The first stage has the lower loss, and its score is none of the second stage's."""
    stages = (
        Stage("bce", **STILL),
        Stage("plain", {"fc": 0.05}, 2, loss="cross_entropy", monitor="loss"),
    )
    rows, result = run(tmp_path / "run", *stages, console=Console(), loss="bce")
    assert rows[0]["val_loss"] < rows[2]["val_loss"] < rows[1]["val_loss"]
    assert "Epoch 2 was its best by loss" in " ".join(capsys.readouterr().out.split())
    assert result.score.loss == rows[2]["val_loss"]


@pytest.mark.slow
def test_run_resumes_where_a_stage_evaluates_its_start(tmp_path):
    stages = (
        dataclasses.replace(ONE_STAGE.stages[0], epochs=1, loss="bce"),
        Stage("plain", {"fc": 1e-2}, 1, monitor="loss", carry="keep"),
    )
    recipe = dataclasses.replace(ONE_STAGE, stages=stages)
    train(tmp_path / "unbroken", recipe)
    for call in (3, 1):  # after the run's start and the first epoch; in the resumed run
        with killed("evaluate", call):
            train(tmp_path / "killed", recipe)
    train(tmp_path / "killed", recipe)
    assert_same_end(tmp_path / "killed", tmp_path / "unbroken")


def test_own_loss_of_a_wrong_shape_is_refused_before_training(tmp_path):
    message = (
        r"stage 'all': loss is 'test_own_loss:mean', which returns shape \[\] for logits and "
        r"targets of shape \[11, 10\]; it must return one value per example, shape \[11\]."
    )
    stage = Stage("all", {"*": 0.1}, 1)
    with pytest.raises(RecipeError, match=message):
        run(tmp_path / "run", stage, loss="test_own_loss:mean")
    stage = dataclasses.replace(stage, loss="test_own_loss:mean")
    with pytest.raises(RecipeError, match=message):
        run(tmp_path / "run", stage)
    assert not (tmp_path / "run").exists()


def test_linear_probe_takes_no_loss():
    with pytest.raises(RecipeError, match="a linear probe takes no steps; leave out loss"):
        Stage("probe", {"fc": LinearProbe()}, loss="bce")
