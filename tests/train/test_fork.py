"""A run that begins at the end of another run's stage."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from mortal import QUIET, RECIPE, go_on, rows

from jaxft import CheckpointError, RecipeError, finetune
from jaxft.anchor import Anchor
from jaxft.checkpoint import Checkpoints
from jaxft.recipe import save

SCRIPT = Path(__file__).parents[2] / "scripts/finetune.py"
HEAD, LATE, ALL = RECIPE.stages


def fork(recipe, workdir, run, stage=None):
    return finetune(recipe, workdir, fork_from=run, stage=stage, console=QUIET)


def with_last(recipe, **fields):
    *before, last = recipe.stages
    return dataclasses.replace(recipe, stages=(*before, dataclasses.replace(last, **fields)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, go_on(workdir)


@pytest.mark.parametrize("stage", ["head", "late"])  # the next one keeps optimizer state, or not
def test_with_the_same_recipe_it_ends_as_that_run_did(stage, run, tmp_path):
    workdir, result = run
    forked = fork(RECIPE, tmp_path / "fork", workdir, stage)
    assert forked.weights.read_bytes() == result.weights.read_bytes()
    after = [row for row in rows(workdir) if row["stage"] not in ("head", stage)]
    assert rows(tmp_path / "fork") == after


def test_what_comes_later_may_change_and_the_run_stays_as_it_is(run, tmp_path):
    workdir, result = run
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    other = with_last(RECIPE, train={"layer3": 1e-3, "fc": 1e-2}, epochs=1)
    assert fork(other, tmp_path / "fork", workdir, "late").score != result.score
    assert [(row["stage"], row["step"]) for row in rows(tmp_path / "fork")] == [("all", 22)]
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} == before


def test_killed_and_called_again_it_goes_on(run, tmp_path, monkeypatch):
    """Also if it had not come to save what it took over."""
    workdir, result = run
    real = Checkpoints.save
    for at in (18, 21):

        def failing(self, step, *args, at=at, **kwargs):
            if step == at:
                raise KeyboardInterrupt
            return real(self, step, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", failing)
            with pytest.raises(KeyboardInterrupt):
                fork(RECIPE, tmp_path / "fork", workdir, "late")
    forked = fork(RECIPE, tmp_path / "fork", workdir, "late")
    assert forked.weights.read_bytes() == result.weights.read_bytes()


def test_on_the_command_line(run, tmp_path):
    workdir, result = run
    save(RECIPE, tmp_path / "recipe.yaml")
    command = [sys.executable, SCRIPT, tmp_path / "recipe.yaml", "--workdir", tmp_path / "fork"]
    options = ["--fork-from", workdir, "--stage", "late"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"from stage 'late' of {workdir}" in done.stdout.replace("\n", " ")
    assert (tmp_path / "fork/model.safetensors").read_bytes() == result.weights.read_bytes()


def test_an_anchor_holds_to_what_the_first_run_started_from(tmp_path):
    """Where that run has kept its start, which it does if any of its stages has an anchor."""
    recipe = with_last(RECIPE, anchor=Anchor())
    result = go_on(tmp_path / "run", recipe)
    forked = fork(recipe, tmp_path / "fork", tmp_path / "run", "late")
    assert forked.weights.read_bytes() == result.weights.read_bytes()


OTHER_NETWORK = dataclasses.replace(RECIPE, model="cifar_resnet20", weights=None)


@pytest.mark.parametrize(
    ("recipe", "stage", "error", "message"),
    [
        (RECIPE, "lat", CheckpointError, "'lat'; stages that have ended: head, late, all"),
        (RECIPE, "all", RecipeError, "no stage after 'all'"),
        (RECIPE, None, RecipeError, "no stage after 'all'"),
        (
            dataclasses.replace(RECIPE, stages=(HEAD, ALL)),
            "late",
            RecipeError,
            "no stage of that name; it has head, all",
        ),
        (OTHER_NETWORK, "late", CheckpointError, "18 does not fit this run:\n.*layer1"),
    ],
    ids=["unknown", "last", "none", "not_in_recipe", "other_network"],
)
def test_what_cannot_be_forked_is_told_before_a_folder_is_made(
    recipe, stage, error, message, run, tmp_path
):
    with pytest.raises(error, match=message):
        fork(recipe, tmp_path / "fork", run[0], stage)
    assert not (tmp_path / "fork").exists()


def test_a_run_without_an_ended_stage_has_nothing_to_fork(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="holds no run with a checkpoint to fork from"):
        fork(RECIPE, tmp_path / "fork", tmp_path / "nowhere")
    real = Checkpoints.save

    def save_and_die(self, *args, **kwargs):
        real(self, *args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        go_on(tmp_path / "run")
    with pytest.raises(CheckpointError, match="no stage has ended"):
        fork(RECIPE, tmp_path / "fork", tmp_path / "run")
    assert not (tmp_path / "fork").exists()


def test_a_stage_alone_names_no_run(tmp_path):
    with pytest.raises(RecipeError, match="stage"):
        finetune(RECIPE, tmp_path / "run", stage="late", console=QUIET)
    assert not (tmp_path / "run").exists()
