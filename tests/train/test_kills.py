"""A run that is killed and resumed ends bit-identically to an unbroken one.

`scripts/soak.py` does the same at random moments.
"""

import dataclasses
import shutil
import signal

import pytest
from mortal import (
    ONE_STAGE,
    RECIPE,
    assert_same_end,
    killed,
    odd_names,
    rows,
    run_until,
    steps,
    terminated,
    train,
    train_to_end,
)

from jaxft import L2SP, InterruptedRunError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]


@pytest.mark.smoke
def test_run_killed_by_sigkill_within_an_epoch(one_stage, tmp_path):
    """While it writes a checkpoint."""
    code, errors = run_until("seal", 6, tmp_path / "killed", ONE_STAGE)
    assert code == -signal.SIGKILL, errors
    assert steps(tmp_path / "killed") == [3, 4]
    train_to_end(tmp_path / "killed", ONE_STAGE)
    assert_same_end(tmp_path / "killed", one_stage)
    assert odd_names(tmp_path / "killed") == []


def test_run_killed_by_sigkill_between_stages(whole, tmp_path):
    """At the end of a stage, and while it writes the end of the next."""
    workdir = tmp_path / "killed"
    for point, at in (("stage end", "head"), ("seal", 18)):
        code, errors = run_until(point, at, workdir)
        assert code == -signal.SIGKILL, (point, errors)
    train_to_end(workdir)
    assert_same_end(workdir, whole)
    assert odd_names(workdir) == []


def test_lost_step_or_checkpoint_is_repeated(whole, tmp_path):
    """Before the first step ends, before the first checkpoint begins, before that of a stage's end,
    in the first step of the next stage, within it, and before the last checkpoint."""
    workdir = tmp_path / "killed"
    points = (("step", 1), ("save", 3), ("save", 8), ("step", 9), ("step", 14), ("save", 26))
    for point, at in points:
        with killed(point, at):
            train(workdir)
    train_to_end(workdir)
    assert_same_end(workdir, whole)


def test_anchor_start_is_saved_before_the_first_checkpoint(tmp_path):
    """A run that died after it had saved its start, completely or in part, starts again."""
    first = dataclasses.replace(RECIPE.stages[0], anchor=L2SP())
    recipe = dataclasses.replace(RECIPE, stages=(first,))
    with killed("save"):
        train(tmp_path / "killed", recipe)
    start = tmp_path / "killed" / "start"
    shutil.copytree(start, start.with_name("start.orbax-checkpoint-tmp"))
    for workdir in ("killed", "unbroken"):
        train_to_end(tmp_path / workdir, recipe)
    assert_same_end(tmp_path / "killed", tmp_path / "unbroken")


def test_metrics_row_is_not_repeated_after_lost_epoch_end(tmp_path):
    """Stopped in validation, a run saves the last step of the epoch; the next dies as it saves the
    end of the epoch, under the same number."""
    workdir = tmp_path / "killed"
    with terminated("evaluate", 2), pytest.raises(InterruptedRunError, match="step 4 is saved"):
        train(workdir, ONE_STAGE)
    with killed("save", 4):
        train(workdir, ONE_STAGE)
    assert [row["step"] for row in rows(workdir)] == [4]
    train_to_end(workdir, ONE_STAGE)
    assert [row["step"] for row in rows(workdir)] == [4, 8]


def test_killed_validation_is_repeated(one_stage, tmp_path):
    """At the start of the run, of an epoch, and once more of the same epoch."""
    workdir = tmp_path / "killed"
    for call in (1, 2, 1):
        with killed("evaluate", call):
            train(workdir, ONE_STAGE)
    train_to_end(workdir, ONE_STAGE)
    assert_same_end(workdir, one_stage)
