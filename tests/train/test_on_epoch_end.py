"""`on_epoch_end`: rows that it receives, and errors that it raises."""

import dataclasses
import json

import mortal
import pytest
from mortal import QUIET, assert_same_end, odd_names, steps

from jaxft import LinearProbe, RecipeError, Stage, finetune
from jaxft.train import finetune as finetune_module

pytestmark = pytest.mark.usefixtures("shared_programs")

# Four steps an epoch: epochs end at steps 1 (the probe), 5, 9, 13 and 17.
RECIPE = dataclasses.replace(
    mortal.RECIPE,
    checkpoint_steps=0,
    dropout=0.0,
    stages=(
        Stage("probe", {"fc": LinearProbe((0.1,))}),
        Stage("head", {"fc": 1e-2}, epochs=2),
        Stage("late", {"fc": 1e-3, "layer3": 1e-3}, epochs=2, carry="keep"),
    ),
)
ENDS = [1, 5, 9, 13, 17]


def run(workdir, on_epoch_end=None, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    return finetune(recipe, workdir, console=QUIET, on_epoch_end=on_epoch_end)


def written(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


class Received(list):
    """A callback that is false until it is called."""

    __call__ = list.append


class PrunedError(Exception):
    """Stands for an error of the user's, such as Optuna's TrialPruned."""


def raising(error, at):
    """Returns a callback that raises the error at a step, and the steps of its calls."""
    calls = []

    def callback(row):
        calls.append(row["step"])
        if row["step"] == at:
            raise error

    return callback, calls


@pytest.fixture(scope="module")
def received():
    return []


@pytest.fixture(scope="module")
def whole(received, tmp_path_factory):
    """Folder of an unbroken run whose callback changes the rows that it receives."""
    workdir = tmp_path_factory.mktemp("whole")

    def callback(row):
        received.append(json.loads(json.dumps(row)))
        row["lr"].clear()
        row.clear()

    run(workdir, callback)
    return workdir


@pytest.mark.slow
def test_on_epoch_end_receives_rows_of_metrics_jsonl(whole, received):
    assert received == written(whole)
    assert [row["step"] for row in received] == ENDS
    assert [row["stage"] for row in received] == ["probe", "head", "head", "late", "late"]


@pytest.mark.slow
def test_on_epoch_end_is_called_in_processes_that_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_module, "is_main_process", lambda: False)
    callback = Received()
    run(tmp_path, callback, stages=RECIPE.stages[:1])
    assert [row["step"] for row in callback] == [1]
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 5, 9, 17])
def test_error_of_on_epoch_end_is_raised_and_the_run_resumes(at, whole, tmp_path):
    """After the probe, within a stage, at the end of a stage, at the end of the run."""
    error = PrunedError("no good")
    callback, calls = raising(error, at)
    with pytest.raises(PrunedError) as caught:
        run(tmp_path, callback)
    assert caught.value is error
    assert (error.__cause__, error.__context__) == (None, None)
    assert calls == [step for step in ENDS if step <= at]
    assert steps(tmp_path)[-1] == at
    assert odd_names(tmp_path) == []
    callback, calls = raising(None, at=None)
    run(tmp_path, callback)
    assert calls == [step for step in ENDS if step > at]
    assert_same_end(tmp_path, whole)


def test_on_epoch_end_must_be_callable(tmp_path):
    workdir = tmp_path / "run"
    with pytest.raises(RecipeError, match="on_epoch_end is 'plot'; it must be a function of one"):
        run(workdir, "plot")
    assert not workdir.exists()
