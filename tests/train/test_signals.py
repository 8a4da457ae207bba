"""Signals: a run saves its step, prints one line, and resumes from there."""

import signal
import threading

import pytest
from faults import before
from mortal import RECIPE, assert_same_end, run_until, steps, train_to_end

from jaxft.cli.finetune import run
from jaxft.recipe_file import save

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("shared_programs")]


def test_signal_saves_the_step_and_run_resumes_from_it(whole, tmp_path, capsys):
    """One run, stopped four times: between two checkpoints, in validation, between two stages while
    the next compiles, and by Ctrl-C."""
    workdir = tmp_path / "run"
    save(RECIPE, tmp_path / "recipe.yaml")
    command = [str(tmp_path / "recipe.yaml"), "--workdir", str(workdir), "--processes", "1"]
    ended = threading.Event()
    for name, point, at, step, where in (
        ("SIGTERM", "step", 5, 5, " in stage 'head', and"),
        ("SIGTERM", "evaluate", 1, 8, " in stage 'head', and"),  # the first since step 5
        ("SIGTERM", "compiled", 2, 8, ", and"),
        ("SIGINT", "step", 14, 14, " in stage 'late', and"),
    ):
        number = getattr(signal, name)
        compiles = before(
            "compile", lambda *_, point=point, **__: point != "compiled" or ended.wait(), at=2
        )
        with compiles, before(point, lambda *_, n=number, **__: signal.raise_signal(n), at):
            code = run(command)
        errors = capsys.readouterr().err
        assert code == (75 if name == "SIGTERM" else 130), errors
        assert steps(workdir)[-1] == step
        assert errors.strip() == (
            f"{name} came{where} step {step} is saved. The same command resumes from there."
        )
    ended.set()
    train_to_end(workdir)
    assert_same_end(workdir, whole)


def test_signal_before_training_saves_nothing(tmp_path):
    """While a compilation runs that would never end."""
    code, errors = run_until("compiled", 1, tmp_path / "run", signals="SIGTERM")
    assert code == 75, errors
    assert "SIGTERM came, and nothing has been trained yet." in errors
    assert steps(tmp_path / "run") == []


def test_second_ctrl_c_ends_without_another_checkpoint(tmp_path):
    """A checkpoint that it had begun is complete."""
    code, errors = run_until("step", 5, tmp_path / "run", signals="SIGINT,SIGINT")
    assert code == 130, errors
    assert "resumes from the last checkpoint" in errors
    assert "Traceback" not in errors
    assert steps(tmp_path / "run") == [3, 4]
