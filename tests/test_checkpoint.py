"""Checkpoints: whole or absent, and safe from the step that overwrites its own buffers."""

import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import Adam, CheckpointError, Stage, plan
from jaxft.checkpoint import Checkpoints

PARAMS = {"body": {"kernel": jnp.arange(6.0).reshape(2, 3)}, "head": {"kernel": jnp.arange(2.0)}}


def test_arrays_and_progress_come_back_bit_for_bit(tmp_path):
    transform = plan([Stage("head", {"head": 0.1}, 1)], PARAMS)[0].transform(Adam())
    arrays = {"params": PARAMS, "opt_state": transform.init(PARAMS)}
    progress = {"stage": 1, "best": {"loss": float("nan"), "accuracy": 0.1 + 0.2}}
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() is None
        checkpoints.save(7, progress, arrays)
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() == 7
        assert checkpoints.path(7).is_dir()
        found = checkpoints.progress(7)
        assert found["best"]["accuracy"] == 0.1 + 0.2
        assert np.isnan(found["best"]["loss"])
        restored = checkpoints.restore(7, jax.eval_shape(lambda: arrays))
    assert jax.tree.structure(restored) == jax.tree.structure(arrays)
    jax.tree.map(np.testing.assert_array_equal, restored, arrays)


def test_donated_buffers_are_saved_as_they_were(tmp_path):
    """The next step may reuse the buffers of what is still being written."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = step({"x": jnp.zeros(4_000_000)})
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for number in (1, 2, 3):
            expected = float(state["x"][0])
            checkpoints.save(number, {}, {"state": state})
            for _ in range(20):
                state = step(state)
            jax.block_until_ready(state)
            like = {"state": jax.eval_shape(lambda: state)}  # noqa: B023
            written = np.asarray(checkpoints.restore(number, like)["state"]["x"])
            np.testing.assert_array_equal(written, expected)


def test_the_newest_two_are_kept(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        for number in (1, 2, 3):
            checkpoints.save(number, {}, {"params": PARAMS})
    assert {path.name for path in tmp_path.iterdir()} == {"2", "3"}


def test_a_full_disk_is_known_before_writing(tmp_path, monkeypatch):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS})
        usage = shutil.disk_usage(tmp_path)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(
            CheckpointError, match=r"needs 1 MiB, and 0 MiB are free. All up to step"
        ):
            checkpoints.save(2, {}, {"params": PARAMS})
    with closing(Checkpoints(tmp_path)) as checkpoints:
        assert checkpoints.latest_step() == 1


def test_a_write_that_fails_is_an_error_and_costs_nothing_older(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("No space left on device")

    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS})
        monkeypatch.setattr(checkpoints._manager, "save", fail)
        with pytest.raises(CheckpointError, match=r"No space left on device. All up to step 1 is"):
            checkpoints.save(2, {}, {"params": PARAMS})


def test_a_step_that_is_not_later_is_refused(tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(3, {}, {"params": PARAMS})
        with pytest.raises(RuntimeError, match="step 3 is not after 3"):
            checkpoints.save(3, {}, {"params": PARAMS})


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"body": PARAMS["body"]}, r"'head'.*float32\[2\], not in the run"),
        ({**PARAMS, "more": jnp.ones(1)}, r"'more'.*missing, not float32\[1\]"),
        ({**PARAMS, "head": {"kernel": jnp.ones(3)}}, r"float32\[2\], not float32\[3\]"),
    ],
    ids=["extra", "missing", "shape"],
)
def test_another_structure_is_refused(other, message, tmp_path):
    with closing(Checkpoints(tmp_path)) as checkpoints:
        checkpoints.save(1, {}, {"params": PARAMS})
        with pytest.raises(CheckpointError, match=message):
            checkpoints.restore(1, {"params": other})
