"""When a stage ends and which epoch was its best, against hand-computed cases."""

import pytest

from jaxft import EarlyStop, Stage
from jaxft.train.evaluate import Score
from jaxft.train.progress import Progress

NAN = float("nan")


def follow(stage, start, values, field):
    """Runs through epochs with these values; returns the progress when it ended."""
    other = {"accuracy": "loss", "loss": "accuracy"}[field]
    at = lambda value: Score(**{field: value, other: 0.5})  # noqa: E731
    progress = Progress.at_start(2, 10, at(start))
    for value in values:
        assert not progress.ended
        progress = progress.after_epoch(stage, 3, at(value))
    return progress


@pytest.mark.parametrize(
    ("until", "field", "start", "values", "best_epoch", "ended"),
    [
        (None, "accuracy", 0.5, [0.6, 0.7, 0.65], 2, "3 of 3 epochs done"),
        (None, "accuracy", 0.9, [0.6, 0.7, 0.65], 0, "3 of 3 epochs done"),
        (None, "accuracy", 0.5, [0.7, 0.7], 1, ""),  # a tie is no improvement
        (None, "accuracy", 0.7, [0.7], 0, ""),
        (None, "accuracy", NAN, [NAN, 0.1, NAN], 2, "3 of 3 epochs done"),
        (EarlyStop(patience=2), "accuracy", 0.5, [0.6, 0.6, 0.5], 1, "has not improved for 2"),
        (EarlyStop(patience=1), "accuracy", 0.5, [0.5], 0, "has not improved for 1"),
        (EarlyStop(patience=1), "accuracy", 0.5, [NAN], 0, "has not improved for 1"),
        (EarlyStop("loss", patience=2), "loss", 1.0, [0.9, 0.95, 0.9], 1, "has not improved for 2"),
        (EarlyStop("loss", patience=2), "loss", 1.0, [0.9, 0.95, 0.8], 3, "3 of 3 epochs done"),
        (EarlyStop("loss", patience=3), "loss", NAN, [2.0, NAN], 1, ""),
    ],
)  # fmt: skip
def test_stage_end(until, field, start, values, best_epoch, ended):
    progress = follow(Stage("x", {"*": 1.0}, epochs=3, until=until), start, values, field)
    assert progress.best_epoch == best_epoch
    assert ended in progress.ended
    assert bool(ended) == bool(progress.ended)
    assert (progress.stage, progress.epoch, progress.step) == (2, len(values), 10 + 3 * len(values))


@pytest.mark.parametrize(("hand_on", "expected"), [("best", 0.7), ("last", 0.65)])
def test_what_is_handed_on(hand_on, expected):
    stage = Stage("x", {"*": 1.0}, epochs=3, hand_on=hand_on)
    progress = follow(stage, 0.5, [0.6, 0.7, 0.65], "accuracy")
    assert progress.handed_on(stage).accuracy == expected
