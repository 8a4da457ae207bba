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
    KilledError,
    assert_same_end,
    die,
    odd_names,
    rows,
    run_until,
    steps,
    train_to_end,
)

from jaxft import L2SP, InterruptedRunError
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.train.metrics import Score
from jaxft.train.state import Progress
from jaxft.train.trainer import Trainer

pytestmark = pytest.mark.slow


def test_run_killed_by_sigkill_within_an_epoch(one_stage, tmp_path):
    """While it writes a checkpoint."""
    code, said = run_until("save:6", tmp_path / "killed", ONE_STAGE)
    assert code == -signal.SIGKILL, said
    assert steps(tmp_path / "killed") == [3, 4]
    train_to_end(tmp_path / "killed", ONE_STAGE)
    assert_same_end(tmp_path / "killed", one_stage)
    assert odd_names(tmp_path / "killed") == []


def test_run_killed_by_sigkill_between_stages(whole, tmp_path):
    """At the end of a stage, in the first step of the next, and while it writes a stage's end."""
    workdir = tmp_path / "killed"
    for point in ("stage:head", "step:9", "save:18"):
        code, said = run_until(point, workdir)
        assert code == -signal.SIGKILL, (point, said)
    train_to_end(workdir)
    assert_same_end(workdir, whole)
    assert odd_names(workdir) == []


def test_lost_step_or_checkpoint_is_repeated(whole, tmp_path, monkeypatch):
    """Before the first step ends, before the first checkpoint begins, before that of a stage's end,
    within a stage, and before the last checkpoint."""
    workdir = tmp_path / "killed"

    def step_ends(number):
        return Progress, "after_step", lambda progress: progress.step + 1 == number

    def checkpoint_begins(number):
        return Checkpoints, "save", lambda _, step, *__: step == number

    points = (
        step_ends(1),
        checkpoint_begins(3),
        checkpoint_begins(8),
        step_ends(14),
        checkpoint_begins(26),
    )
    for owner, name, reached in points:
        with monkeypatch.context() as patch:
            die(patch, owner, name, reached)
            with pytest.raises(KilledError):
                train_to_end(workdir)
    train_to_end(workdir)
    assert_same_end(workdir, whole)


def test_anchor_start_is_saved_before_the_first_checkpoint(tmp_path, monkeypatch):
    """A run that died after it had saved its start, completely or in part, starts again."""
    first = dataclasses.replace(RECIPE.stages[0], anchor=L2SP())
    recipe = dataclasses.replace(RECIPE, stages=(first,))
    with monkeypatch.context() as patch:
        die(patch, Checkpoints, "save", lambda *_: True)
        with pytest.raises(KilledError):
            train_to_end(tmp_path / "killed", recipe)
    start = tmp_path / "killed" / "start"
    shutil.copytree(start, start.with_name("start.orbax-checkpoint-tmp"))
    for workdir in ("killed", "unbroken"):
        train_to_end(tmp_path / workdir, recipe)
    assert_same_end(tmp_path / "killed", tmp_path / "unbroken")


def test_metrics_row_is_not_repeated_after_lost_epoch_end(tmp_path, monkeypatch):
    """Stopped in validation, a run saves the last step of the epoch; the next dies as it saves the
    end of the epoch, under the same number."""
    workdir = tmp_path / "killed"
    scores = iter([Score(1.0, 0.5, 1.0), None])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", lambda *_: next(scores))
        with pytest.raises(InterruptedRunError, match="step 4 is saved"):
            train_to_end(workdir, ONE_STAGE)
    with monkeypatch.context() as patch:
        die(patch, Checkpoints, "save", lambda _, step, *__: step == 4)
        with pytest.raises(KilledError):
            train_to_end(workdir, ONE_STAGE)
    assert [row["step"] for row in rows(workdir)] == [4]
    train_to_end(workdir, ONE_STAGE)
    assert [row["step"] for row in rows(workdir)] == [4, 8]


def test_killed_validation_is_repeated(one_stage, tmp_path, monkeypatch):
    """At the start of the run, of an epoch, and once more of the same epoch."""
    workdir = tmp_path / "killed"
    real = Trainer.evaluate
    for call in (1, 2, 1):
        calls = []

        def failing(*args, calls=calls, call=call):
            calls.append(call)
            if len(calls) == call:
                raise KilledError
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "evaluate", failing)
            with pytest.raises(KilledError):
                train_to_end(workdir, ONE_STAGE)
    train_to_end(workdir, ONE_STAGE)
    assert_same_end(workdir, one_stage)
