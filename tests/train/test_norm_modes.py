"""The five ways to treat norm layers against torch's own, recorded in float64."""

from pathlib import Path

import numpy as np
import pytest
from float64_stages import assert_as_recorded, train

from jaxft import Stage

GOLDEN = Path(__file__).parents[1] / "golden" / "norm_modes.npz"
LATE = {"fc": 0.05, "layer3": 0.02}
CASES = {
    "A": (Stage("a", LATE, steps=4, norms="A"),),
    "B": (Stage("b", LATE, steps=4),),
    # fastai's freeze: the convolutions of the body stay, its norms train
    "C": (Stage("c", {"fc": 0.05, "layer3": 0.02, "**.bn*": 0.02}, steps=4, norms="C"),),
    "D": (Stage("d", LATE, steps=4, norms="D"),),
    "E": (Stage("e", LATE, steps=4, norms="E"),),
    "mapped": (
        Stage(
            "m",
            {"fc": 0.05, "layer3.0.conv*": 0.02, "layer2": 0.02},
            steps=4,
            norms={"layer3": "A", "*": "E"},
        ),
    ),
    # Lightning's milestones: norms never train; D, and A where the layer has been thawed
    "thawed": (
        Stage("head", {"fc": 0.05}, steps=4, norms="D"),
        Stage(
            "late", {"fc": 0.05, "layer3.0.conv*": 0.02}, steps=4, norms={"layer3": "A", "*": "D"}
        ),
    ),
}


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
