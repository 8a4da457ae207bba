"""Runs with metrics of the user: rows, table, export, best epoch, resume, errors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mortal import ONE_STAGE, QUIET, assert_same_end, killed, rows, steps, train, train_to_end

from jaxft import SGD, EarlyStop, LinearProbe, Recipe, RecipeError, Stage, finetune, models
from jaxft.data import Preprocessing, Splits
from jaxft.data.digits import read
from jaxft.report.console import Console

MODEL = models.create("cifar_resnet8", num_classes=10)
DIGITS = read("0-9")
TRAIN, VAL = DIGITS.take(np.arange(22)), DIGITS.take(np.arange(24, 45))
SIZE = Preprocessing(image_size=8, resize_size=8)


def true_probability(logits, targets):
    return jnp.sum(targets * jax.nn.softmax(logits), -1)


def confidence(logits, targets):
    return jnp.max(jax.nn.softmax(logits), -1)


def error(logits, targets):
    return logits.argmax(-1) != targets.argmax(-1)


def of_class(logits, targets):
    return logits.argmax(-1).sum()


METRICS = tuple(f"test_own_metrics:{f.__name__}" for f in (confidence, true_probability, error))


def run(workdir, *stages, console=QUIET, **fields):
    """Returns the rows and the result of a run from `MODEL.init`."""
    plain = {"augment": "none", "optimizer": SGD(), "batch_size": 6, "metrics": METRICS}
    recipe = Recipe(
        model=MODEL.name, data="digits", stages=stages, image_size=8, resize_size=8,
        **{**plain, **fields},
    )  # fmt: skip
    given = {"data": Splits(TRAIN, VAL), "start": MODEL.init(jax.random.key(1))}
    result = finetune(recipe, workdir, console=console, **given)
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], result


def expected_at_start(source, *, flip=False):
    """Returns the metrics of the weights that the run starts from."""
    params, stats = MODEL.init(jax.random.key(1))
    views = [source.images, source.images[:, :, ::-1]] if flip else [source.images]
    logits = [MODEL.apply(params, stats, SIZE.normalize(x), norms="running")[0] for x in views]
    logits = np.mean(logits, axis=0, dtype=np.float64)
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    return {
        "true_probability": p[np.arange(len(p)), source.targets].mean(),
        "confidence": p.max(1).mean(),
        "error": np.mean(logits.argmax(1) != source.targets),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"cache_mib": 0, "tta": "flip"},
        {"steps_per_execution": 3, "mixup": 0.3, "label_smoothing": 0.1},
    ],
    ids=["cached", "flip", "several steps"],
)
def test_metrics_of_the_user_in_rows_table_and_export(settings, tmp_path, capsys):
    """The weights stay those of the start; 22 images fill three batches of 6 and a part."""
    stage = Stage("still", {"fc": 1e-30}, 2, accumulate=2, restore="last")
    (_, row), result = run(tmp_path / "run", stage, console=Console(), **settings)
    flip = settings.get("tta") == "flip"
    expected = {"val": expected_at_start(VAL, flip=flip), "train": expected_at_start(TRAIN)}
    for split, values in expected.items():
        if split == "train" and "mixup" in settings:  # logits of mixed images
            assert 0 <= row["train_error"] <= 1
            continue
        for name, value in values.items():
            assert row[f"{split}_{name}"] == pytest.approx(value, rel=1e-4), (split, name)
    assert row["train_error"] == pytest.approx(1 - row["train_accuracy"])
    assert row["val_error"] == pytest.approx(1 - row["val_accuracy"])
    score = json.loads((tmp_path / "run/model.json").read_text())["score"]
    assert score == {name: row[f"val_{name}"] for name in score}
    assert score.keys() == {"loss", "accuracy", "top5", "true_probability", "confidence", "error"}
    assert result.score.custom["error"] == row["val_error"]
    printed = capsys.readouterr().out.splitlines()
    (header,) = (line for line in printed if "train loss" in line)
    assert header.split()[5:] == ["accuracy", "confidence", "seconds"]  # one fits into 80 columns
    (start,) = (line for line in printed if line.startswith("  start  "))
    assert start.split()[4] == f"{row['val_confidence']:.4f}"


@pytest.mark.slow
def test_linear_probe_reports_metrics_of_the_user(tmp_path):
    (probe, plain), _ = run(
        tmp_path / "run",
        Stage("probe", {"fc": LinearProbe((1.0,))}, restore="last"),
        Stage("still", {"fc": 1e-30}, 1, restore="last"),
    )
    for split in ("train", "val"):
        for name in ("true_probability", "confidence", "error"):
            values = probe[f"{split}_{name}"], plain[f"{split}_{name}"]
            assert values[0] == pytest.approx(values[1], rel=1e-3), (split, name)


@pytest.mark.slow
def test_best_epoch_and_early_stop_by_metric_of_the_user(tmp_path, capsys):
    until = EarlyStop("true_probability", mode="min", patience=2)
    stages = (
        Stage("largest", {"fc": 0.05}, 3, monitor="true_probability"),
        Stage("smallest", {"fc": 0.05}, 9, until=until),
    )
    found, result = run(tmp_path / "run", *stages, console=Console())
    largest, smallest = (
        [row["val_true_probability"] for row in found if row["stage"] == stage.name]
        for stage in stages
    )
    said = " ".join(capsys.readouterr().out.split())
    best = largest.index(max(largest))
    assert f"Epoch {best + 1} was its best by true_probability and is kept (true_pro" in said
    assert smallest.index(min(smallest)) == len(smallest) - 3  # two epochs of patience follow
    assert "ended: true_probability has not improved for 2 epochs" in said
    assert result.score.custom["true_probability"] == min(max(largest), *smallest)


@pytest.mark.slow
def test_metrics_and_loss_of_the_user_survive_a_kill_within_an_epoch(tmp_path):
    """Checkpoints follow steps 3 and 6 of two epochs of 4 steps."""
    recipe = dataclasses.replace(
        ONE_STAGE, metrics=METRICS, loss="optax:softmax_cross_entropy", mixup=0.2
    )
    train_to_end(tmp_path / "unbroken", recipe)
    for step in (4, 7):
        with killed("step", step):
            train(tmp_path / "killed", recipe)
        assert steps(tmp_path / "killed")[-1] == step - 1
    train_to_end(tmp_path / "killed", recipe)
    assert_same_end(tmp_path / "killed", tmp_path / "unbroken")
    assert all(row["train_true_probability"] > 0 for row in rows(tmp_path / "killed"))


def test_metric_of_a_wrong_shape_is_refused_before_training(tmp_path):
    name = "test_own_metrics:of_class"
    with pytest.raises(RecipeError, match=rf"a metric is '{name}', which returns shape \[\] for"):
        run(tmp_path / "run", Stage("all", {"*": 0.1}, 1), metrics=(name,))
    assert not (tmp_path / "run").exists()
