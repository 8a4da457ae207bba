"""What a stage adds to a step, against the same written in torch, recorded in float64."""

from pathlib import Path

import numpy as np
import pytest
from float64_stages import assert_as_recorded, train

from jaxft import Anchor, Stage

GOLDEN = Path(__file__).parents[1] / "golden" / "step_options.npz"
TRAIN = {"fc": 0.05, "layer3": 0.02}
EMA = 0.75
WEIGHTS = (1.0, 0.5, 2.0, 4.0, 0.25, 1.0, 0.0, 3.0, 1.5, 1.0)
CASES = {
    "clip": (Stage("x", TRAIN, steps=4, norms="A", clip_norm=3.0),),
    "accumulate": (Stage("x", TRAIN, steps=4, norms="A", accumulate=4),),
    "ema": (Stage("x", TRAIN, steps=4, norms="A", ema=EMA),),
    # The second stage is still held to where the run began.
    "anchor": (
        Stage("x", TRAIN, steps=4, norms="A", anchor=Anchor(0.5, 0.25)),
        Stage("y", TRAIN, steps=4, norms="A", anchor=Anchor(2.0, 0.5), clip_norm=3.0),
    ),
    "classes": (Stage("x", TRAIN, steps=4, norms="A", class_weights=WEIGHTS, label_smoothing=0.25),),
    "all": (
        Stage(
            "x", TRAIN, steps=4, norms="A", clip_norm=3.0, accumulate=2, ema=EMA, anchor=Anchor(0.5, 0.25),
            class_weights=WEIGHTS, label_smoothing=0.25,
        ),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as recorded:
        return dict(recorded)


@pytest.mark.parametrize("case", CASES)
def test_steps_are_torchs(case, golden, monkeypatch):
    trained = train(CASES[case], monkeypatch)
    of_case = {name: x for name, x in golden.items() if name.startswith(f"{case}/")}
    assert_as_recorded({f"{case}/{name}": x for name, x in trained.items()}, of_case)


def test_the_recording_is_torchs(golden):
    pytest.importorskip("torch")
    from record_stage_steps import recorded

    assert_as_recorded(recorded(CASES), golden)
