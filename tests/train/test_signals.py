"""A run that is asked to stop saves where it is, says so, and goes on from there."""

import pytest
from mortal import assert_same_end, go_on, run_until, steps


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    go_on(workdir)
    return workdir


def test_asked_to_stop_it_saves_the_step_and_goes_on_from_there(unbroken, tmp_path):
    """One run, stopped five times: between two checkpoints, in validation, at a boundary while
    the next stage compiles, in the first step after it, and by Ctrl-C."""
    workdir = tmp_path / "run"
    # Where each start begins decides which validation, or stage, is its first.
    for signals, point, step, name in (
        ("SIGTERM", "step:5", 5, "head"),
        ("SIGTERM", "score:1", 8, "head"),
        ("SIGTERM", "compile:2", 8, None),
        ("SIGTERM", "step:9", 9, "late"),
        ("SIGINT", "step:14", 14, "late"),
    ):
        stopped = run_until(point, workdir, signals=signals)
        assert stopped.returncode == (75 if signals == "SIGTERM" else 130), stopped.stderr
        assert steps(workdir)[-1] == step
        where = f"in stage {name!r}, and step {step} is saved" if name else f", and step {step} is"
        assert f"{signals} came {where}".replace(" ,", ",") in stopped.stderr
        assert "The same command goes on from there." in stopped.stderr
        assert "Traceback" not in stopped.stderr
    go_on(workdir)
    assert_same_end(workdir, unbroken)


@pytest.mark.parametrize("point", ["compile:1", "score:1"])
def test_before_anything_is_trained_it_just_ends(point, tmp_path):
    """Also if a compiler is at work that would never be done."""
    stopped = run_until(point, tmp_path / "run", signals="SIGTERM")
    assert stopped.returncode == 75, stopped.stderr
    assert "SIGTERM came, and nothing has been trained yet." in stopped.stderr
    assert steps(tmp_path / "run") == []


def test_ctrl_c_twice_saves_nothing_more(tmp_path):
    """Nor does it wait for the compiler, which is at work on the next stage, or hangs."""
    stopped = run_until("step:5", tmp_path / "run", signals="SIGINT,SIGINT")
    assert stopped.returncode == 130, stopped.stderr
    assert "goes on from the last checkpoint" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert steps(tmp_path / "run") == [3, 4]
