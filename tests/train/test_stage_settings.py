"""Settings of a stage hold in that stage only, and `metrics.jsonl` records the truth."""

import dataclasses
import json
import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from faults import before, replaced
from mortal import QUIET
from safetensors.numpy import load_file

from jaxft import (
    L2SP,
    SGD,
    Adam,
    EarlyStop,
    Focal,
    JaxftError,
    Optax,
    PlateauStop,
    Recipe,
    ReduceLROnPlateau,
    Stage,
    finetune,
    models,
    plan,
    weights,
)
from jaxft.data import Batch, Preprocessing, Splits
from jaxft.data.digits import read
from jaxft.devices import Devices
from jaxft.optim import schedules
from jaxft.recipe_file import read as read_recipe
from jaxft.report.console import Console
from jaxft.train.eval_step import eval_step
from jaxft.train.loss import Loss
from jaxft.train.metrics import MEASURED, Metrics, Score
from jaxft.train.stage_program import _replicas, build_program

pytestmark = pytest.mark.usefixtures("stage_ends_only")

MODEL = models.create("cifar_resnet8", num_classes=10)
DIGITS = read("0-9")
TRAIN, VAL = DIGITS.take(np.arange(24)), DIGITS.take(np.arange(24, 48))
SIZE = Preprocessing(image_size=8, resize_size=8)


def recipe(*stages, **fields):
    plain = {"augment": "none", "optimizer": SGD(), "batch_size": 6, "sync_steps": 100}
    return Recipe(
        model=MODEL.name, data="digits", stages=stages, image_size=8, resize_size=8,
        **{**plain, **fields},
    )  # fmt: skip


def run(workdir, *stages, seed=1, console=QUIET, **fields):
    """Returns the rows and the result of a run from `MODEL.init`."""
    given = {"data": Splits(TRAIN, VAL), "start": MODEL.init(jax.random.key(seed))}
    result = finetune(recipe(*stages, **fields), workdir, console=console, **given)
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row) for row in rows], result


OWN = {
    "batch_size": 8, "augment": "shift", "random_erasing": 0.3, "mixup": 0.2, "cutmix": 1.0,
    "loss": "bce", "label_smoothing": 0.1, "balance": "sampling",
}  # fmt: skip


def programs(*stages, **fields):
    given = recipe(*stages, **fields)
    start = jax.eval_shape(MODEL.init, jax.random.key(0))
    return [
        build_program(index, stage, given, MODEL, TRAIN, Devices(), start)
        for index, stage in enumerate(plan(stages, start[0]))
    ]


@pytest.mark.parametrize("field", OWN)
def test_stage_setting_applies_to_that_stage_only(field):
    before, own, after = programs(
        Stage("before", {"fc": 0.1}, 1),
        Stage("own", {"fc": 0.1}, 1, **{field: OWN[field]}),
        Stage("after", {"fc": 0.1}, 1),
    )
    for other in (before, after):
        assert other.settings == dataclasses.replace(
            own.settings, **{field: getattr(other.settings, field)}
        )
        assert other.loss == Loss()
        assert other.settings.loss == other.loss.function == "cross_entropy"
    assert own.loss.function == own.settings.loss
    assert getattr(own.settings, field) == OWN[field] != getattr(before.settings, field)
    if hasattr(own.loss, field):
        assert own.loss == Loss(**{field: OWN[field]})
    steps = 3 if field == "batch_size" else 4
    assert (before.steps, own.steps, after.steps) == (4, steps, 4)
    assert (before.sizes.rows, own.sizes.rows) == (6, own.settings.batch_size)


@pytest.mark.parametrize(("statistics", "count"), [("global", 1), ("slice", 2), ("replica", 8)])
def test_statistics_choose_number_of_replicas(statistics, count):
    class TwoSlices:
        slices = 2

        def __len__(self):
            return 8

    stage = Stage("all", {"*": 1e-3}, epochs=1)
    recipe = Recipe(model="resnet18", data="digits", stages=stage, statistics=statistics)
    assert _replicas(recipe, TwoSlices()) == count


def test_stage_setting_overrides_recipe():
    plain, whole = (
        Stage(
            "plain", {"fc": 0.1}, 1,
            mixup=0.0, label_smoothing=0.0, balance="none", loss="cross_entropy",
        ),
        Stage("whole", {"fc": 0.1}, 1, class_weights=(1.0, 2.0) * 5),
    )  # fmt: skip
    settings = {"mixup": 0.2, "label_smoothing": 0.1, "loss": Focal()}
    first, second = programs(plain, whole, balance="loss", **settings)
    assert first.loss == Loss()
    del settings["loss"]
    assert second.loss == Loss(function=Focal(), class_weights=(1.0, 2.0) * 5, **settings)
    (balanced,) = programs(Stage("x", {"fc": 0.1}, 1), balance="loss")
    counts = np.bincount(TRAIN.targets, minlength=10)
    assert balanced.loss.class_weights == pytest.approx(24 / (10 * counts))


@pytest.mark.slow
def test_batches_follow_stage_settings(tmp_path):
    drawn = []

    def record(_, config, **__):
        drawn.append([config.batch_size, config.augment, config.balanced, config.rows])

    with before("train batches", record):
        rows, _ = run(
            tmp_path / "run",
            Stage("own", {"fc": 0.1}, 1, batch_size=8, augment="shift", balance="sampling"),
            Stage("recipe's", {"fc": 0.1}, 1),
            Stage("parts", {"fc": 0.1}, 1, batch_size=10, accumulate=2),
        )
    assert drawn == [[8, "shift", True, 8], [6, "none", False, 6], [10, "none", False, 10]]
    assert [row["step"] for row in rows] == [3, 7, 10]


@pytest.mark.slow
def test_metrics_row_of_one_step_worked_out_in_numpy(tmp_path):
    rows, result = run(
        tmp_path / "run", Stage("one", {"fc": 0.5}, 1, restore="last"), batch_size=24
    )
    params, stats = MODEL.init(jax.random.key(1))
    images = SIZE.normalize(TRAIN.images)
    features, _ = MODEL.apply(params, stats, images, norms="running", last="layer3")
    features = np.asarray(features, np.float64)
    logits = features @ np.asarray(params["fc"]["kernel"]) + np.asarray(params["fc"]["bias"])
    shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    onehot = np.eye(10)[TRAIN.targets]
    error = (shares - onehot) / 24
    norm = math.hypot(np.linalg.norm(features.T @ error), np.linalg.norm(error.sum(0)))
    better = (logits > np.sum(logits * onehot, 1, keepdims=True)).sum(1)
    (row,) = rows
    close = pytest.approx
    expected = {
        "stage": "one",
        "epoch": 1,
        "step": 1,
        "train_loss": close(-np.mean(np.log((shares * onehot).sum(1))), rel=1e-5),
        "train_accuracy": close(np.mean(better == 0)),
        "train_top5": close(np.mean(better < 5)),
        "lr": {"fc": close(0.5)},
        "gradient_norms": {"fc": close(norm, rel=1e-5)},
        "update_norms": {"fc": close(0.5 * norm, rel=1e-5)},
        "skipped_steps": 0,
        **{f"val_{name}": value for name, value in result.score.values.items()},
    }
    assert row.keys() == expected.keys() | {*MEASURED}
    assert {name: row[name] for name in expected} == expected
    waits = {"time", "input_wait_seconds", "feature_seconds", "checkpoint_seconds"}
    assert all(row[name] > 0 for name in {*MEASURED} - waits)
    assert row["seconds"] > row["step_seconds"] + row["input_wait_seconds"]
    # The rate of the steps alone: validation's time is in `seconds` only.
    assert row["images_per_second"] > 24 / row["seconds"]
    assert row["input_wait_seconds"] >= 0


@pytest.mark.slow
def test_ema_is_validated_exported_and_restored(tmp_path):
    """Runs of one step, of two, and of two with their average, which a last stage keeps."""

    def trained(name, *stages):
        rows, result = run(tmp_path / name, *stages)
        return rows, load_file(result.weights)

    stage = Stage("x", {"fc": 0.05, "layer3": 0.05}, steps=2, restore="last", norms="batch")
    params, stats = MODEL.init(jax.random.key(1))
    _, one = trained("one", dataclasses.replace(stage, steps=1))
    _, two = trained("two", stage)
    still = Stage("still", {"fc.bias": 1e-30}, steps=1, restore="last")
    rows, average = trained("average", dataclasses.replace(stage, ema=0.75), still)
    weights.save(tmp_path / "start.safetensors", MODEL, params, stats)
    start = load_file(tmp_path / "start.safetensors")
    for name, a in average.items():
        if a.ndim:
            expected = 0.75 * (0.75 * start[name] + 0.25 * one[name]) + 0.25 * two[name]
            np.testing.assert_allclose(a, expected, rtol=1e-4, atol=1e-6, err_msg=name)
    assert np.abs(average["fc.weight"] - two["fc.weight"]).max() > 1e-3
    params, stats = weights.load(tmp_path / "average" / "model.safetensors", MODEL)
    batch = Batch(VAL.images, VAL.targets, np.ones(24, bool))
    found = Metrics.total([eval_step(MODEL, SIZE)(params, stats, batch)]).score
    for row in rows:  # the average has not moved since
        assert row["val_loss"] == pytest.approx(found.loss, rel=1e-5)
        assert row["val_accuracy"] == found.accuracy


@pytest.mark.slow
def test_anchor_is_start_of_run_and_holds_in_its_stage_only(tmp_path):
    free = Stage("free", {"layer3": 0.5}, steps=1, restore="last")
    held = dataclasses.replace(free, name="held", anchor=L2SP(body=1e6), clip_norm=1e-30)
    rows, _ = run(tmp_path / "run", free, held, dataclasses.replace(free, name="again"))
    assert [row["stage"] for row in rows] == ["free", "held", "again"]
    moved, pulled = rows[0]["update_norms"]["layer3"], rows[1]["gradient_norms"]["layer3"]
    assert pulled == pytest.approx(1e6 * moved, rel=1e-4)
    assert rows[1]["update_norms"]["layer3"] < 1e-29
    assert rows[2]["gradient_norms"]["layer3"] < 100


@pytest.mark.slow
def test_sync_steps_reads_the_device_every_few_steps(tmp_path, monkeypatch):
    step, read, kind = 0, set(), type(jnp.zeros(()))
    real = kind._value

    def value(array):
        read.add(step)
        return real.fget(array)

    def count(progress):
        nonlocal step
        step = progress.step + 1

    monkeypatch.setattr(kind, "_value", property(value))
    with before("step", count):
        rows, _ = run(
            tmp_path / "run",
            Stage("x", {"fc": 0.1}, 1),
            batch_size=3,
            sync_steps=3,
            on_nonfinite="skip",
        )
    assert rows[0]["step"] == 8
    assert read == {0, 3, 6, 8}


LOSSES = [1.0, 0.95, 0.92, 0.91, 0.85, 0.5, 0.46, 0.46, math.nan, 0.46, 0.47]
PLATEAU = {"factor": 0.5, "patience": 1, "threshold": 0.1, "cooldown": 1}
RATES = [0.01] * 3 + [0.005] * 5 + [0.0025] * 3  # torch 2.13.0; the next one is 0.00125


def test_recorded_plateau_schedule_is_torchs():
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **PLATEAU)
    rates = []
    for loss in LOSSES:
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
    assert rates == RATES
    assert optimizer.param_groups[0]["lr"] == 0.00125


@pytest.mark.slow
def test_optax_optimizer_by_name_trains_and_is_saved(tmp_path):
    rules = {"name": Optax("optax:scale_by_adam", {"b1": 0.8}), "class": Adam(b1=0.8)}
    for name, rule in rules.items():
        run(tmp_path / name, Stage("all", {"*": 1e-3}, 2), optimizer=rule)
    by_name, by_class = (load_file(tmp_path / name / "model.safetensors") for name in rules)
    assert by_name.keys() == by_class.keys()
    for path, array in by_name.items():
        np.testing.assert_allclose(array, by_class[path], rtol=1e-5, atol=1e-6, err_msg=path)
    assert read_recipe(tmp_path / "name" / "recipe.yaml").optimizer == rules["name"]


@pytest.mark.slow
def test_schedule_time_continues_over_stages_that_end_early(tmp_path):
    """The second stage ends after one of its three epochs; the third has its planned time."""
    continued = {"schedule": schedules.CosineAnnealingLR(), "schedule_time": "continue"}
    stops = EarlyStop("loss", patience=1, min_delta=9.0, baseline="start")
    rows, _ = run(
        tmp_path / "run",
        Stage("head", {"fc": 0.01}, 2, **continued),
        Stage("short", {"fc": 0.01}, 3, until=stops, **continued),
        Stage("last", {"fc": 0.01}, 1, **continued),
    )
    assert [row["stage"] for row in rows] == ["head", "head", "short", "last"]
    expected = [(1 + math.cos(math.pi * t / 6)) / 200 for t in (0, 1, 2, 5)]
    assert [row["lr"]["fc"] for row in rows] == pytest.approx(expected)


@pytest.mark.slow
def test_stage_end_by_steps_epochs_minutes_and_plateau(tmp_path, monkeypatch, capsys):
    """The first that is reached ends the stage, within an epoch or after it."""
    losses = iter([9.0] * 6 + LOSSES)  # of the start, of the stages before, of the last one
    clock, passed = time.perf_counter, 0

    def pass_time(progress):  # so much that the machine's own time does not count
        nonlocal passed
        passed += 1000 * (progress.stage == 2)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + passed)
    head, cosine = {"fc": 0.01}, schedules.CosineAnnealingLR(by="step")
    stages = (
        Stage("steps", head, steps=6, schedule=cosine),
        Stage("epochs", head, epochs=1, steps=6, schedule=cosine),
        Stage("minutes", head, epochs=9, max_minutes=100, schedule=cosine),
        Stage(
            "plateaus",
            head,
            20,
            schedule=ReduceLROnPlateau(**PLATEAU),
            until=PlateauStop(reductions=2),
        ),
    )
    scored = replaced("evaluate", lambda *_: Score(next(losses), 0.5, 0.5))
    with scored, before("step", pass_time):  # one of LOSSES is NaN
        rows, _ = run(tmp_path / "run", *stages, console=Console(), on_nonfinite="skip")
    ends = [(row["stage"], row["epoch"], row["step"]) for row in rows]
    assert ends[:5] == [
        ("steps", 1, 4), ("steps", 2, 6), ("epochs", 1, 10), ("minutes", 1, 14), ("minutes", 2, 16),
    ]  # fmt: skip
    assert ends[5:] == [("plateaus", n, 16 + 4 * n) for n in range(1, 12)]
    rates = [row["lr"]["fc"] for row in rows]
    # A closed form is as long as its stage would be: 6 steps, 4, and 36.
    cosines = [(1 + math.cos(math.pi * at)) / 200 for at in (0, 4 / 6, 0, 0, 4 / 36)]
    assert rates[:5] == pytest.approx(cosines)
    assert rates[5:] == pytest.approx(RATES)
    said = " ".join(capsys.readouterr().out.split())
    for sentence in (
        "Stage 1 of 4: steps, 6 steps, 4 an epoch",
        "Stage 'steps' ended: 6 of 6 steps done.",
        "Stage 2 of 4: epochs, 1 epoch of 4 steps",
        "Stage 'epochs' ended: 1 of 1 epochs done.",
        "Stage 3 of 4: minutes, at most 9 epochs of 4 steps",
        "Stage 'minutes' ended: its 100 minutes are over.",
        "Stage 4 of 4: plateaus, at most 20 epochs of 4 steps",
        "Stage 'plateaus' ended: the learning rate met its plateau number 3.",
    ):
        assert sentence in said


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        (
            {"class_weights": (1.0, 2.0)},
            {},
            "stage 'wrong': it has 2 class_weights, and there are 10 classes: 0, 1",
        ),
        ({"batch_size": 99}, {"drop_last": True}, "stage 'wrong': drop_last leaves nothing"),
        (
            {"norms": "train_all"},
            {},
            "norms: with 'train_all' all norm layers train, and 7 are frozen",
        ),
        ({"norms": {"layer9": "batch"}}, {}, "pattern 'layer9' matches"),
        ({"accumulate": 4}, {}, "a batch of 6 cannot be divided into 4 equal parts"),
        ({"accumulate": 4, "batch_size": 10}, {}, "a batch of 10 cannot"),
        ({"batch_size": 0}, {}, "batch_size must be at least 1"),
        ({"batch_size": 1}, {"mixup": 0.2}, "mixup mixes images of a batch; batch_size is 1"),
        ({"label_smoothing": 1.0}, {}, "label_smoothing is 1.0"),
        ({"random_erasing": -0.1}, {}, "random_erasing is -0.1"),
        ({"augment": "mirror"}, {}, "augment"),
        ({"ema": 1.0}, {}, "ema is 1.0; a decay lies between 0 and 1"),
        ({"clip_norm": 0.0}, {}, "clip_norm is 0.0"),
        ({"max_minutes": math.inf}, {}, "max_minutes is inf"),
        ({"steps": 0}, {}, "it has 0 steps"),
        ({"until": PlateauStop()}, {}, "needs a ReduceLROnPlateau"),
    ],
    ids=str,
)
def test_wrong_stage_settings_are_refused_before_training(settings, fields, message, tmp_path):
    with pytest.raises(JaxftError, match=message) as caught:
        run(
            tmp_path / "run",
            Stage("good", {"fc": 0.1}, 1),
            Stage("wrong", {"fc": 0.1}, 1, **settings),
            **fields,
        )
    assert "stage 'wrong'" in str(caught.value).replace("Stage", "stage")
    assert not (tmp_path / "run").exists()
