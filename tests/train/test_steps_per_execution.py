"""`steps_per_execution`: several steps in one call compute the same as one by one."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from faults import before
from mortal import (
    RECIPE,
    assert_close,
    assert_same_end,
    killed,
    train,
    train_to_end,
)

from jaxft import SGD, NonFiniteError, RecipeError, Stage
from jaxft.data import Batch
from jaxft.devices import Devices
from jaxft.steps_per_execution import apart, one_by_one, sent

pytestmark = pytest.mark.usefixtures("shared_programs")

# Eight batches of 4, the last half empty: calls end at checkpoints, at epochs' ends, between.
SINGLE = dataclasses.replace(
    RECIPE,
    batch_size=4,
    optimizer=SGD(momentum=0.9),  # Adam makes much of a last bit where a gradient is about 0
    tta="flip",
    checkpoint_steps=7,
    num_views=1,
    stages=(
        Stage("head", {"fc": 1e-2}, epochs=2),  # from what is kept
        Stage("late", {"fc": 1e-3, "layer3": 1e-3}, steps=12, carry="keep", ema=0.9),
        Stage("all", {"*": 1e-3}, epochs=1, accumulate=2, restore="last"),
    ),
)
IN_FOURS = dataclasses.replace(SINGLE, steps_per_execution=4)


@pytest.fixture(scope="module")
def in_fours(tmp_path_factory):
    """The run of IN_FOURS."""
    workdir = tmp_path_factory.mktemp("in fours")
    train_to_end(workdir, IN_FOURS)
    return workdir


@pytest.mark.slow
def test_steps_per_execution_changes_nothing(in_fours, tmp_path):
    train_to_end(tmp_path, SINGLE)
    assert_close(in_fours, tmp_path)


@pytest.mark.slow
def test_calls_end_at_checkpoints_and_epochs(tmp_path):
    calls = []
    with before("send", lambda _, batches, *__: calls.append(len(batches))):
        train_to_end(tmp_path, dataclasses.replace(IN_FOURS, stages=SINGLE.stages[:2]))
    # Checkpoints at steps 7, 14, 21; epochs end at steps 8, 16, 24, the stages at 16 and 28.
    assert calls == [4, 3, 1, 4, 2, 2, 4, 1, 3, 4]


@pytest.mark.slow
def test_steps_per_execution_resumes_at_any_step(in_fours, tmp_path):
    """Also with checkpoints at other steps than before."""
    for step, every in ((6, 5), (15, 7), (36, 5)):
        recipe = dataclasses.replace(IN_FOURS, checkpoint_steps=every)
        with killed("step", step):
            train(tmp_path, recipe)
    train_to_end(tmp_path, dataclasses.replace(IN_FOURS, checkpoint_steps=0))
    assert_same_end(tmp_path, in_fours)


@pytest.mark.slow
def test_non_finite_step_within_a_call_is_named(tmp_path):
    stages = (Stage("all", {"*": 1e38}, epochs=2),)
    messages = []
    for number in (1, 2, 5):
        recipe = dataclasses.replace(
            SINGLE, steps_per_execution=number, stages=stages, checkpoint_steps=0
        )
        with pytest.raises(NonFiniteError) as stop:
            train_to_end(tmp_path / str(number), recipe)
        messages.append(str(stop.value))
    assert len(set(messages)) == 1


def test_padded_steps_of_a_call_are_not_taken():
    batches = [Batch(np.full((2, 1), i, np.float32), np.zeros(2), np.ones(2)) for i in (1, 2, 3)]
    stacked, count = sent(Devices(), batches, 5)

    def step(total, batch, i):
        total += batch.image.sum() * 10**i
        return total, {"seen": total}

    total, records = one_by_one(step, jnp.float32(0), stacked, count)
    assert float(total) == 2 + 40 + 600
    assert [float(record["seen"]) for record in apart(records, 3, 5)] == [2, 42, 642]
    np.testing.assert_array_equal(records["seen"][3:], 0)


def test_single_batch_is_not_stacked():
    batch = Batch(np.ones((2, 1)), np.zeros(2), np.ones(2))
    (alone,) = sent(Devices(), [batch], 1)
    assert alone.image.shape == (2, 1)
    assert apart({"x": jnp.ones(())}, 1, 1) == [{"x": 1}]


def test_steps_per_execution_must_be_positive():
    with pytest.raises(RecipeError, match="steps_per_execution must be at least 1"):
        dataclasses.replace(RECIPE, steps_per_execution=0)
