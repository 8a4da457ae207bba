"""Every recipe's training against a recorded float64 training in PyTorch.

Compares losses, learning rates, weights, statistics and moments. Tolerances are relative to the
norm of each tensor.
"""

import numpy as np
import pytest
from trajectories import CASES, CONFIGS, train
from trajectories import GOLDEN as GOLDEN  # read by the fixture `golden`

RTOL = {"loss": 1e-9, "lr": 1e-9, "params": 1e-9, "stats": 1e-10, "moments": 1e-8}
# These do not train in steps, or their steps are tested elsewhere.
TESTED_ELSEWHERE = {
    *("quickstart", "quickstart_from_scratch", "hymenoptera_resnet50", "auto_rgn", "lora")
}
# Each optimizer, schedules by step and by epoch, a binary loss, and label smoothing.
FLOAT32 = ("keras_guide", "bit", "layer_decay")
SMOKE = ("d2l_hotdog, its own, its own", "lp_ft, its own, its own")


def case_arrays(golden, case):
    return {name[len(case) + 1 :]: x for name, x in golden.items() if name.startswith(f"{case}/")}


def assert_as_recorded(actual, recorded):
    assert actual.keys() == recorded.keys()
    for name, expected in recorded.items():
        part = name.rpartition("/")[2]
        scale = expected if part in ("loss", "lr") else expected[:, :1]
        worst = np.abs(actual[name] - expected) / np.maximum(np.abs(scale), 1e-12)
        assert actual[name].shape == expected.shape, name
        assert worst.max(initial=0.0) <= RTOL[part], (name, worst.max())


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=pytest.mark.smoke) for case in SMOKE]
    + [case for case in CASES if case not in SMOKE],
)
def test_recipe_trains_as_in_pytorch(case, golden):
    recorded = case_arrays(golden, case)
    assert_as_recorded(train(case), recorded)
    assert all(len(x) >= 10 for name, x in recorded.items() if name.endswith("/loss"))


@pytest.mark.slow
@pytest.mark.parametrize("config", FLOAT32)
def test_recipe_losses_in_float32_are_close_to_pytorchs(config, golden):
    case = next(case for case in CASES if CASES[case][0] == config)
    recorded = case_arrays(golden, case)
    actual = train(case, "float32", steps=20)
    stages = sorted({name.split("/")[0] for name in actual})
    losses, expected = (
        np.concatenate([x[f"{stage}/loss"] for stage in stages]) for x in (actual, recorded)
    )
    assert len(expected) >= 20
    np.testing.assert_allclose(losses[:20], expected[:20], rtol=1e-4)


def test_every_recipe_is_compared_with_pytorch():
    compared = {config for config, _, _ in CASES.values()}
    assert {path.stem for path in CONFIGS.glob("*.py")} == compared | TESTED_ELSEWHERE


def test_recorded_variants_of_seed_differ(golden):
    """Norm modes and carry change the training, so each case tests its variant."""
    trainings = [case_arrays(golden, case) for case in CASES if case.startswith("seed, ")]
    ends = {x["2/params"].tobytes() + x["2/stats"].tobytes() for x in trainings}
    assert len(ends) == len(trainings) == 4


@pytest.mark.parametrize("case", CASES)
def test_recorded_trainings_equal_pytorchs(case, golden):
    pytest.importorskip("torch")
    from torch_recipes import record

    assert_as_recorded(record(case), case_arrays(golden, case))
