"""`augment_on_device`: runs with and without it end with identical weights."""

import dataclasses

import pytest
from mortal import RECIPE, assert_same_end, killed, train, train_to_end
from test_devices import end, line, start

from jaxft import RecipeError, Stage
from jaxft.lr_finder import ramp, range_test, trial
from jaxft.recipe_file import save

JITTER = dataclasses.replace(
    RECIPE,
    augment="jitter",
    batch_size=12,
    checkpoint_steps=0,
    stages=(Stage("late", {"fc": 1e-3, "layer3": 1e-3}, epochs=3, restore="last"),),
)


def on_device(recipe):
    return dataclasses.replace(recipe, augment_on_device=True)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.smoke),
        {"augment": "shift_flip", "balance": "sampling"},
        {"augment": "crop_flip", "mixup": 0.2, "random_erasing": 0.5},
        {"steps_per_execution": 3},
        {"num_views": 2},
        {"worker_processes": 2},
        {"stages": (Stage("head", {"fc": 1e-2}, epochs=2, accumulate=3, auto_rgn=True),)},
    ],
    ids=str,
)
@pytest.mark.slow
def test_augment_on_device_changes_no_bit(fields, tmp_path):
    recipe = dataclasses.replace(JITTER, **fields)
    for name, each in (("host", recipe), ("device", on_device(recipe))):
        train_to_end(tmp_path / name, each)
    assert_same_end(tmp_path / "device", tmp_path / "host")


@pytest.mark.slow
def test_augment_on_device_may_change_in_a_run(tmp_path):
    train_to_end(tmp_path / "whole", JITTER)
    with killed("save", 6):  # of 9 steps
        train(tmp_path / "resumed", on_device(JITTER))
    train(tmp_path / "resumed", JITTER)
    assert_same_end(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.slow
def test_augment_on_device_on_two_devices(tmp_path):
    save(JITTER, tmp_path / "host.yaml")
    save(on_device(JITTER), tmp_path / "device.yaml")
    lines = [(line(tmp_path / f"run-{name}", recipe=name), 0) for name in ("host", "device")]
    code, _, errors = end(start(lines, 2))
    assert code == 0, errors
    assert_same_end(tmp_path / "run-device", tmp_path / "run-host")


@pytest.mark.slow
def test_range_test_augments_on_device():
    stage, ends = JITTER.stages[0], {"low": 1e-5, "high": 1e-2}
    trials = [trial(each, ramp(stage, steps=10, **ends)) for each in (JITTER, on_device(JITTER))]
    host, device = (range_test(each, **ends) for each in trials)
    assert host == device


@pytest.mark.parametrize("augments", [("none",), ("randaugment", "none")], ids=str)
def test_augment_on_device_without_effect_is_an_error(augments, tmp_path):
    stages = [Stage(each, {"fc": 1e-3}, epochs=1, augment=each) for each in augments]
    recipe = on_device(dataclasses.replace(JITTER, stages=tuple(stages)))
    message = f"augment={' and '.join(augments)} leaves no step to the device. Use one of crop_flip"
    with pytest.raises(RecipeError, match=message):
        train(tmp_path / "run", recipe)
