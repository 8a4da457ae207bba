"""Killed at any point and called again, a run ends bit-identically to an unbroken one.

`scripts/soak.py` does the same at random moments, for as long as one likes.
"""

import dataclasses
import shutil
import signal

import pytest
from mortal import RECIPE, KilledError, assert_same_end, die, go_on, odd_names, rows, run_until

from jaxft import Anchor, InterruptedRunError
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.train.metrics import Score
from jaxft.train.state import Progress
from jaxft.train.trainer import Trainer

pytestmark = pytest.mark.slow


def test_sigkill_changes_nothing(whole, tmp_path):
    """While it writes within an epoch, as a stage ends, in the first step after, and while it
    writes a stage's end: one run, killed four times."""
    workdir = tmp_path / "killed"
    for point in ("save:6", "stage:head", "step:9", "save:18"):
        code, said = run_until(point, workdir)
        assert code == -signal.SIGKILL, (point, said)
    go_on(workdir)
    assert_same_end(workdir, whole)
    assert odd_names(workdir) == []


@pytest.mark.parametrize(
    ("owner", "name", "points"),
    [
        (Progress, "after_step", (1, 9, 14, 25)),
        (Checkpoints, "save", (3, 8, 18, 26)),
    ],
    ids=["step", "save"],
)
def test_whatever_is_lost_is_done_again(owner, name, points, whole, tmp_path, monkeypatch):
    """A step that was not finished; a checkpoint that was not begun, also that of a stage's end."""
    workdir = tmp_path / "killed"
    for point in points:
        with monkeypatch.context() as patch:
            die(
                patch,
                owner,
                name,
                lambda self, step=None, *_: (step or self.step + 1) == point,  # noqa: B023
            )
            with pytest.raises(KilledError):
                go_on(workdir)
    go_on(workdir)
    assert_same_end(workdir, whole)


def test_what_an_anchor_holds_to_is_kept_before_the_first_checkpoint(tmp_path, monkeypatch):
    """A run that has kept its start, whole or in part, and then died at once starts again."""
    first = dataclasses.replace(RECIPE.stages[0], anchor=Anchor())
    recipe = dataclasses.replace(RECIPE, stages=(first,))
    with monkeypatch.context() as patch:
        die(patch, Checkpoints, "save", lambda *_: True)
        with pytest.raises(KilledError):
            go_on(tmp_path / "killed", recipe)
    start = tmp_path / "killed" / "start"
    shutil.copytree(start, start.with_name("start.orbax-checkpoint-tmp"))
    for workdir in ("killed", "unbroken"):
        go_on(tmp_path / workdir, recipe)
    assert_same_end(tmp_path / "killed", tmp_path / "unbroken")


def test_the_row_of_an_epoch_whose_end_is_lost_is_not_there_twice(whole, tmp_path, monkeypatch):
    """Asked to stop in validation, it saves the epoch's last step; then it dies as it saves the
    epoch's end, by the same number."""
    workdir = tmp_path / "killed"
    scores = iter([Score(1.0, 0.5, 1.0), None])
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "evaluate", lambda *_: next(scores))
        with pytest.raises(InterruptedRunError, match="step 4 is saved"):
            go_on(workdir)
    with monkeypatch.context() as patch:
        die(patch, Checkpoints, "save", lambda _, step, *__: step == 4)
        with pytest.raises(KilledError):
            go_on(workdir)
    assert [row["step"] for row in rows(workdir)] == [4]
    go_on(workdir)
    assert [row["step"] for row in rows(workdir)] == [row["step"] for row in rows(whole)]


def test_validation_that_was_cut_short_is_done_again(whole, tmp_path, monkeypatch):
    """Of the run's start, of an epoch, and of the same once more."""
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
                go_on(workdir)
    go_on(workdir)
    assert_same_end(workdir, whole)
