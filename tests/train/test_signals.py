"""Signals: a run saves its step, prints one line, and resumes from there."""

import pytest
from mortal import assert_same_end, run_until, steps, train_to_end

pytestmark = pytest.mark.slow


def test_signal_saves_the_step_and_run_resumes_from_it(whole, tmp_path):
    """One run, stopped four times: between two checkpoints, in validation, between two stages while
    the next compiles, and by Ctrl-C."""
    workdir = tmp_path / "run"
    for signals, point, step, where in (
        ("SIGTERM", ("step", 5), 5, " in stage 'head', and"),
        ("SIGTERM", ("evaluate", 1), 8, " in stage 'head', and"),  # the first since step 5
        ("SIGTERM", ("compiled", 2), 8, ", and"),
        ("SIGINT", ("step", 14), 14, " in stage 'late', and"),
    ):
        code, errors = run_until(*point, workdir, signals=signals)
        assert code == (75 if signals == "SIGTERM" else 130), errors
        assert steps(workdir)[-1] == step
        assert f"{signals} came{where} step {step} is saved. The same command resumes" in errors
        assert "Traceback" not in errors
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
