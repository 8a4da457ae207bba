"""A run that is asked to stop saves where it is, says so, and goes on from there."""

import pytest
from mortal import assert_same_end, go_on, run_until, steps

pytestmark = pytest.mark.slow


def test_asked_to_stop_it_saves_the_step_and_goes_on_from_there(whole, tmp_path):
    """One run, stopped four times: between two checkpoints, in validation, at a boundary while
    the next stage compiles, and by Ctrl-C."""
    workdir = tmp_path / "run"
    for signals, point, step, where in (
        ("SIGTERM", "step:5", 5, " in stage 'head', and"),
        ("SIGTERM", "score:1", 8, " in stage 'head', and"),  # the first since step 5
        ("SIGTERM", "compile:2", 8, ", and"),
        ("SIGINT", "step:14", 14, " in stage 'late', and"),
    ):
        code, said = run_until(point, workdir, signals=signals)
        assert code == (75 if signals == "SIGTERM" else 130), said
        assert steps(workdir)[-1] == step
        assert f"{signals} came{where} step {step} is saved. The same command goes on" in said
        assert "Traceback" not in said
    go_on(workdir)
    assert_same_end(workdir, whole)


@pytest.mark.parametrize("point", ["compile:1", "score:1"])
def test_before_anything_is_trained_it_just_ends(point, tmp_path):
    """Also if a compiler is at work that would never be done."""
    code, said = run_until(point, tmp_path / "run", signals="SIGTERM")
    assert code == 75, said
    assert "SIGTERM came, and nothing has been trained yet." in said
    assert steps(tmp_path / "run") == []


def test_ctrl_c_twice_saves_nothing_more(tmp_path):
    """But what it had begun to save is whole."""
    code, said = run_until("step:5", tmp_path / "run", signals="SIGINT,SIGINT")
    assert code == 130, said
    assert "goes on from the last checkpoint" in said
    assert "Traceback" not in said
    assert steps(tmp_path / "run") == [3, 4]
