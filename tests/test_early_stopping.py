"""When a stage ends and which epoch was its best, against hand-computed cases."""

import dataclasses
import json
import math
from functools import partial

import numpy as np
import pytest

import jaxft
from jaxft import EarlyStop, PlateauStop, RecipeError, ReduceLROnPlateau, Stage
from jaxft.report.stage_text import epilogue
from jaxft.train.metrics import Score
from jaxft.train.state import Progress

NAN, INF = float("nan"), float("inf")
EPOCHS = "epochs done"  # that the stage has no further epoch
WAITED, MARGIN = "has not improved for", "has not improved by more than"


def follow(stage, start, values, field, *, length=None, reductions=()):
    """Runs through epochs with these values; returns the progress when it ended."""
    other = Score(loss=0.5, accuracy=0.5, top5=0.5)
    at = lambda value: dataclasses.replace(other, **{field: value})  # noqa: E731
    progress = Progress.at_start(2, 10, at(start))
    for epoch, value in enumerate(values, 1):
        assert not progress.ended
        progress = progress.after_step().after_step().after_step()
        done = EPOCHS if epoch == length else ""
        met = reductions[epoch - 1] if reductions else 0
        progress = progress.after_epoch(stage, at(value), done=done, reductions=met)
    return progress


from_start = partial(EarlyStop, baseline="start")

CASES = [  # until, field, its value at the start and after each epoch -> best epoch, why it ended
    # Without a rule of its own a stage goes by accuracy, to its last epoch.
    (None, "accuracy", 0.5, [0.6, 0.7, 0.65], 2, EPOCHS),
    (None, "accuracy", 0.9, [0.6, 0.7, 0.65], 0, EPOCHS),
    (None, "accuracy", 0.5, [0.7, 0.7], 1, ""),  # a tie is no improvement
    (None, "accuracy", 0.7, [0.7], 0, ""),
    (None, "accuracy", NAN, [NAN, 0.1, NAN], 2, EPOCHS),
    # patience: waited >= patience, strictly better starts anew
    (from_start(patience=2), "accuracy", 0.5, [0.6, 0.6, 0.5], 1, f"{WAITED} 2 epochs"),
    (from_start(patience=2), "accuracy", 0.5, [0.4, 0.6, 0.5], 2, EPOCHS),
    (from_start(patience=1), "accuracy", 0.5, [0.5], 0, f"accuracy {WAITED} 1 epoch"),
    (from_start(patience=1), "accuracy", 0.5, [NAN], 0, f"{WAITED} 1 epoch"),
    (from_start(patience=1), "accuracy", NAN, [NAN], 0, f"{WAITED} 1 epoch"),
    (from_start("top5", patience=1), "top5", 0.5, [0.6, 0.5], 1, f"top5 {WAITED} 1 epoch"),
    (from_start("loss", patience=2), "loss", 1.0, [0.9, 0.95, 0.9], 1, f"loss {WAITED} 2 epochs"),
    (from_start("loss", patience=2), "loss", 1.0, [0.9, 0.95, 0.8], 3, EPOCHS),
    (from_start("loss", patience=3), "loss", NAN, [2.0, NAN], 1, ""),
    (from_start("loss", patience=2), "loss", INF, [3.0, INF, INF], 1, f"{WAITED} 2 epochs"),
    # from nothing, anything clears the bar, whatever the margin
    (from_start(patience=1, min_delta=0.5), "accuracy", NAN, [0.1, 0.2], 2, f"{MARGIN} 0.5 for 1"),
    (from_start("loss", patience=1, min_delta=0.5), "loss", INF, [3.0, 2.4], 2, ""),
    # mode: whatever the monitor
    (from_start("loss", patience=1, mode="max"), "loss", 1.0, [1.1, 1.0], 1, f"{WAITED} 1 epoch"),
    (from_start(patience=1, mode="min"), "accuracy", 0.5, [0.4, 0.4], 1, f"{WAITED} 1 epoch"),
    # min_delta: more than that; the bar stays where it was last cleared, the best does not
    (from_start(patience=2, min_delta=0.25), "accuracy", 0.0, [0.25, 0.5, 0.5], 2, EPOCHS),
    (from_start(patience=2, min_delta=0.25), "accuracy", 0.0, [0.125, 0.25], 2, MARGIN),
    (from_start("loss", patience=1, min_delta=0.5), "loss", 2.0, [1.25, 0.5, 0.25], 3, MARGIN),
    # min_epochs: not before, and the wait goes on counting
    (from_start(patience=1, min_epochs=3), "accuracy", 0.5, [0.4, 0.4], 0, ""),
    (from_start(patience=1, min_epochs=2), "accuracy", 0.5, [0.4, 0.4], 0, f"{WAITED} 2 epochs"),
    (from_start(patience=3, min_epochs=2), "accuracy", 0.5, [0.4, 0.4], 0, ""),
    (from_start(patience=1, min_epochs=2), "accuracy", 0.5, [0.4, 0.6], 2, ""),
    (from_start(patience=1, min_epochs=9), "accuracy", 0.5, [0.4, 0.4, 0.4], 0, EPOCHS),
    # the best is by what is monitored, and of a PlateauStop by accuracy as without a rule
    (from_start(patience=2), "loss", 1.0, [0.9, 0.8], 0, f"accuracy {WAITED} 2 epochs"),
    (PlateauStop(), "accuracy", 0.5, [0.6, 0.4], 1, ""),
    (PlateauStop(), "loss", 1.0, [0.5, 0.4, 0.3], 0, EPOCHS),
    # By default the first epoch improves on nothing, and the start may still be the best.
    (EarlyStop(patience=1), "accuracy", 0.9, [0.5, 0.6], 0, ""),
    (EarlyStop(patience=1), "accuracy", 0.9, [0.5, 0.5], 0, f"accuracy {WAITED} 1 epoch"),
    (EarlyStop(patience=2), "accuracy", 0.9, [0.5, 0.4, 0.6], 0, EPOCHS),
    (EarlyStop(patience=1, min_delta=0.5), "accuracy", 0.0, [0.1, 0.2], 2, f"{MARGIN} 0.5 for 1"),
    (EarlyStop("loss", patience=1), "loss", 0.1, [2.0, 1.0], 0, ""),
    (EarlyStop("loss", patience=2), "loss", 0.1, [NAN, 2.0, 1.0], 0, EPOCHS),
    (EarlyStop("loss", patience=1), "loss", 0.1, [NAN], 0, f"loss {WAITED} 1 epoch"),
]  # fmt: skip


@pytest.mark.parametrize(("until", "field", "start", "values", "best_epoch", "ended"), CASES)
def test_stage_end(until, field, start, values, best_epoch, ended):
    plateau = ReduceLROnPlateau() if isinstance(until, PlateauStop) else None
    stage = Stage("x", {"*": 1.0}, epochs=3, until=until, schedule=plateau)
    progress = follow(stage, start, values, field, length=3)
    assert progress.best_epoch == best_epoch
    assert ended in progress.ended
    assert bool(ended) == bool(progress.ended)
    assert (progress.stage, progress.epoch, progress.step) == (2, len(values), 10 + 3 * len(values))
    assert progress.position == 0
    fields = json.loads(json.dumps(dataclasses.asdict(progress)))
    assert repr(Progress.from_fields(fields)) == repr(progress)


def score(**values):
    return Score(**{"loss": 0.5, "accuracy": 0.5, "top5": 0.5, **values})


@pytest.mark.parametrize(
    ("fields", "best_epoch", "ended"),
    [
        ({"monitor": "loss"}, 2, ""),  # best by loss, never stop
        ({"monitor": "loss", "until": EarlyStop(patience=2)}, 2, f"accuracy {WAITED} 2 epochs"),
        ({"monitor": "accuracy", "until": EarlyStop("loss", patience=1)}, 1, "loss has not"),
        ({"monitor": "top5"}, 0, ""),
        ({"monitor": "loss", "until": EarlyStop("loss", mode="max")}, 3, ""),
        ({"until": EarlyStop("loss")}, 2, ""),
        ({}, 1, ""),
    ],
    ids=str,
)
def test_early_stop_monitor_and_best_epoch_monitor(fields, best_epoch, ended):
    stage = Stage("x", {"*": 1.0}, epochs=9, **fields)
    progress = Progress.at_start(0, 0, score())
    for accuracy, loss in ((0.6, 0.4), (0.55, 0.3), (0.5, 0.9)):
        progress = progress.after_epoch(stage, score(accuracy=accuracy, loss=loss))
    assert progress.best_epoch == best_epoch
    assert ended in progress.ended
    assert bool(ended) == bool(progress.ended)


@pytest.mark.parametrize(
    ("fields", "best_epoch", "ended"),
    [
        ({"monitor": "f1"}, 2, ""),  # larger is better
        ({"monitor": "f1", "until": EarlyStop("f1", mode="min")}, 3, ""),
        ({"until": EarlyStop("f1", patience=1)}, 2, f"f1 {WAITED} 1 epoch"),
        ({"until": EarlyStop("f1", mode="min", patience=1)}, 0, f"f1 {WAITED} 1 epoch"),
    ],
    ids=str,
)
def test_early_stop_by_metric_of_the_recipe(fields, best_epoch, ended):
    stage = Stage("x", {"*": 1.0}, epochs=9, **fields)
    progress = Progress.at_start(0, 0, score(custom={"f1": 0.5}))
    for f1 in (0.6, 0.7, 0.4):
        if not progress.ended:
            progress = progress.after_epoch(stage, score(custom={"f1": f1}))
    assert progress.best_epoch == best_epoch
    assert ended in progress.ended
    assert bool(ended) == bool(progress.ended)
    assert Progress.from_fields(json.loads(json.dumps(dataclasses.asdict(progress)))) == progress


def torch_loop(values, patience, min_delta, mode):
    """The epoch after which torch's usual loop, Lightning and Keras stop, or None."""
    best, waited = math.inf if mode == "min" else -math.inf, 0
    for epoch, value in enumerate(values, 1):
        if value < best - min_delta if mode == "min" else value > best + min_delta:
            best, waited = value, 0
        else:
            waited += 1
        if waited >= patience:
            return epoch
    return None


def test_early_stopping_counts_as_torch_lightning_and_keras():
    rng = np.random.default_rng(0)
    for _ in range(300):
        patience, min_delta = int(rng.integers(1, 4)), float(rng.choice([0.0, 0.125]))
        monitor, mode = [("accuracy", "max"), ("loss", "min")][rng.integers(2)]
        until = EarlyStop(monitor, patience=patience, min_delta=min_delta)
        stage = Stage("x", {"*": 1.0}, epochs=12, until=until)
        start, *values = (rng.integers(0, 9, 13) / 8).tolist()
        progress = Progress.at_start(0, 0, score(**{monitor: start}))
        for value in values:
            if not progress.ended:
                progress = progress.after_epoch(stage, score(**{monitor: value}))
        stopped = progress.epoch if progress.ended else None
        assert stopped == torch_loop(values, patience, min_delta, mode)


@pytest.mark.parametrize(
    ("fields", "epochs", "keep", "sentence"),
    [
        ({}, (0.7, 0.6), False, "Epoch 1 was its best by accuracy and is kept (accuracy 0.7000)."),
        (
            {"monitor": "loss"},
            (0.7, 0.6),
            False,
            "No epoch improved on the loss of its start, which is kept (loss 0.5000, "
            "accuracy 0.5000).",
        ),
        ({}, (0.7, 0.6), True, "The optimizer state after epoch 1 is kept"),
        ({}, (0.4, 0.3), True, "The optimizer state at its start is kept"),
        ({}, (0.6, 0.7), True, "Epoch 2 was its best by accuracy and is kept (accuracy 0.7000)."),
        ({"restore": "last"}, (0.7, 0.6), True, "Its last epoch is kept (accuracy 0.6000)."),
    ],
    ids=str,
)
def test_closing_line_names_metric_and_optimizer_state(fields, epochs, keep, sentence):
    params = {"fc": np.ones(2)}
    (plan,) = jaxft.plan([Stage("x", {"fc": 1.0}, epochs=2, **fields)], params)
    progress = Progress.at_start(0, 0, score())
    for epoch, accuracy in enumerate(epochs, 1):
        done = "done" if epoch == 2 else ""
        progress = progress.after_epoch(plan.stage, score(accuracy=accuracy), done=done)
    said = epilogue(plan, progress, keep=keep)
    assert sentence in said
    assert ("optimizer" in said) == ("optimizer" in sentence)


def test_closing_line_names_metric_of_the_recipe():
    (plan,) = jaxft.plan([Stage("x", {"fc": 1.0}, 1, monitor="f1")], {"fc": np.ones(2)})
    progress = Progress.at_start(0, 0, score(custom={"f1": 0.5}))
    progress = progress.after_epoch(plan.stage, score(custom={"f1": 0.75}), done="done")
    sentence = "Epoch 1 was its best by f1 and is kept (f1 0.7500, accuracy 0.5000)."
    assert sentence in epilogue(plan, progress)


def test_early_stop_sentence_names_min_delta():
    stage = Stage("x", {"*": 1.0}, epochs=3, until=EarlyStop(patience=1, min_delta=0.25))
    ended = follow(stage, 0.5, [0.5, 0.5], "accuracy").ended
    assert ended == "accuracy has not improved by more than 0.25 for 1 epoch"


@pytest.mark.parametrize(
    ("allowed", "met", "ended_after"), [(0, [0, 1], 2), (1, [0, 1, 1, 2], 4), (2, [0, 1, 2], None)]
)
def test_plateau_ends_stage_after_reductions(allowed, met, ended_after):
    plateau = ReduceLROnPlateau(patience=0)
    stage = Stage("x", {"*": 1.0}, epochs=9, schedule=plateau, until=PlateauStop(allowed))
    progress = follow(stage, 0.5, [0.4] * len(met), "accuracy", reductions=met)
    assert bool(progress.ended) == (ended_after == len(met))
    if ended_after:
        assert progress.ended == f"the learning rate met its plateau number {allowed + 1}"


@pytest.mark.parametrize(("restore", "expected"), [("best", 0.7), ("last", 0.65)])
def test_restored_epoch(restore, expected):
    stage = Stage("x", {"*": 1.0}, epochs=3, restore=restore)
    progress = follow(stage, 0.5, [0.6, 0.7, 0.65], "accuracy")
    assert progress.restored_score(stage).accuracy == expected


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda: EarlyStop(patience=0), "patience is 0; it must be at least 1"),
        (
            lambda: EarlyStop(min_delta=-1.0, min_epochs=-1),
            "min_delta is -1.0; .*; min_epochs is -1; it must not be negative",
        ),
        (lambda: EarlyStop(min_delta=NAN), "min_delta is nan"),
        (lambda: PlateauStop(-1), "reductions is -1"),
        (lambda: Stage("x", {"*": 1.0}, 3, until=PlateauStop(1)), "PlateauStop, which needs a"),
    ],
)
def test_wrong_early_stop_is_refused(rule, message):
    with pytest.raises(RecipeError, match=message):
        rule()
