"""Several steps in one call change nothing but how long they take."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from mortal import RECIPE, KilledError, assert_close, assert_same_end, die, go_on

from jaxft import SGD, RecipeError, Stage
from jaxft.data import Batch
from jaxft.parallel import Devices
from jaxft.train.execution import apart, one_by_one, sent
from jaxft.train.progress import Progress

# Eight batches of 4, the last half empty: calls end at checkpoints, at epochs' ends, between.
SINGLE = dataclasses.replace(
    RECIPE,
    batch_size=4,
    optimizer=SGD(momentum=0.9),  # Adam makes much of a last bit where a gradient is about 0
    tta="flip",
    checkpoint_steps=7,
    views=1,
    stages=(
        Stage("head", {"fc": 1e-2}, epochs=2),  # from what is kept
        Stage("late", {"fc": 1e-3, "layer3": 1e-3}, steps=12, carry="keep", ema=0.9),
        Stage("all", {"*": 1e-3}, epochs=1, accumulate=2, hand_on="last"),
    ),
)
IN_FOURS = dataclasses.replace(SINGLE, steps_per_execution=4)


@pytest.fixture(scope="module")
def in_fours(tmp_path_factory):
    """The run of IN_FOURS."""
    workdir = tmp_path_factory.mktemp("in fours")
    go_on(workdir, IN_FOURS)
    return workdir


def test_a_run_is_the_same(in_fours, tmp_path):
    go_on(tmp_path, SINGLE)
    assert_close(in_fours, tmp_path)


def test_killed_anywhere_it_ends_the_same(in_fours, tmp_path, monkeypatch):
    for step in (6, 11, 25, 34):
        with monkeypatch.context() as patch:
            die(patch, Progress, "after_step", lambda p, step=step: p.step + 1 == step)
            with pytest.raises(KilledError):
                go_on(tmp_path, IN_FOURS)
    go_on(tmp_path, IN_FOURS)
    assert_same_end(tmp_path, in_fours)


def test_places_that_are_not_filled_are_no_steps():
    batches = [Batch(np.full((2, 1), i, np.float32), np.zeros(2), np.ones(2)) for i in (1, 2, 3)]
    stacked = sent(Devices(), batches, 5)

    def step(total, batch, i):
        total += batch.image.sum() * 10**i
        return total, {"seen": total}

    total, records = one_by_one(step, jnp.float32(0), stacked, jnp.int32(3))
    assert float(total) == 2 + 40 + 600
    assert [float(record["seen"]) for record in apart(records, 3)] == [2, 42, 642]
    np.testing.assert_array_equal(records["seen"][3:], 0)


def test_a_single_batch_is_not_stacked():
    batch = Batch(np.ones((2, 1)), np.zeros(2), np.ones(2))
    assert sent(Devices(), [batch], 1).image.shape == (2, 1)
    assert apart({"x": jnp.ones(())}, 1) == [{"x": 1}]


def test_at_least_one():
    with pytest.raises(RecipeError, match="steps_per_execution must be at least 1"):
        dataclasses.replace(RECIPE, steps_per_execution=0)
