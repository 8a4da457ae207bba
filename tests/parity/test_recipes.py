"""Every recipe's training against PyTorch's, recorded in float64: losses, rates, weights, moments.

The bounds are relative to the norm of each tensor.
"""

import numpy as np
import pytest
from trajectories import CASES, CONFIGS, GOLDEN, VARIANTS, train

RTOL = {"loss": 1e-9, "rates": 1e-9, "params": 1e-9, "stats": 1e-10, "moments": 1e-8}
# Not a training in steps, or one whose steps have tests of their own.
ELSEWHERE = {"quickstart", "hymenoptera_resnet50", "auto_rgn"}
# Each optimizer, schedules by step and by epoch, a binary loss, and label smoothing.
FLOAT32 = (
    "pytorch_tutorial_finetune",
    "fastai_fine_tune",
    "keras_guide",
    "bit",
    "layer_decay",
)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as recorded:
        return dict(recorded)


def of_case(golden, case):
    return {name[len(case) + 1 :]: x for name, x in golden.items() if name.startswith(f"{case}/")}


def assert_as_recorded(told, recorded):
    assert told.keys() == recorded.keys()
    for name, expected in recorded.items():
        part = name.rpartition("/")[2]
        scale = expected if part in ("loss", "rates") else expected[:, :1]
        worst = np.abs(told[name] - expected) / np.maximum(np.abs(scale), 1e-12)
        assert told[name].shape == expected.shape, name
        assert worst.max(initial=0.0) <= RTOL[part], (name, worst.max())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_trains_as_in_pytorch(case, golden):
    recorded = of_case(golden, case)
    assert_as_recorded(train(case), recorded)
    assert all(len(x) >= 10 for name, x in recorded.items() if name.endswith("/loss"))


@pytest.mark.slow
@pytest.mark.parametrize("config", FLOAT32)
def test_in_float32_its_losses_are_close(config, golden):
    case = next(case for case in CASES if CASES[case][0] == config)
    recorded = of_case(golden, case)
    told = train(case, "float32", steps=20)
    stages = sorted({name.split("/")[0] for name in told})
    losses, expected = (
        np.concatenate([x[f"{stage}/loss"] for stage in stages]) for x in (told, recorded)
    )
    assert len(expected) >= 20
    np.testing.assert_allclose(losses[:20], expected[:20], rtol=1e-4)


def test_no_recipe_is_left_out():
    assert {path.stem for path in CONFIGS.glob("*.py")} == VARIANTS.keys() | ELSEWHERE


def test_all_that_varies_differs(golden):
    """Modes and carrying change what is recorded: no test of one passes by the other's."""
    for config, variants in VARIANTS.items():
        cases = [case for case in CASES if CASES[case][0] == config]
        last = [of_case(golden, case) for case in cases]
        ends = {x[max(x)].tobytes() + x[max(x).replace("stats", "params")].tobytes() for x in last}
        assert len(ends) == len(variants), config


@pytest.mark.parametrize("case", CASES)
def test_the_recording_is_pytorchs(case, golden):
    pytest.importorskip("torch")
    from torch_recipes import recorded

    assert_as_recorded(recorded(case), of_case(golden, case))
