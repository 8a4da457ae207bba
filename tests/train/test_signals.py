"""A run that is asked to stop saves where it is, says so, and goes on from there."""

import pytest
from mortal import assert_same_end, go_on, run_until, steps


def test_asked_to_stop_it_saves_the_step_and_goes_on_from_there(whole, tmp_path):
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
        code, said = run_until(point, workdir, signals=signals)
        assert code == (75 if signals == "SIGTERM" else 130), said
        assert steps(workdir)[-1] == step
        where = f"in stage {name!r}, and step {step} is saved" if name else f", and step {step} is"
        assert f"{signals} came {where}".replace(" ,", ",") in said
        assert "The same command goes on from there." in said
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
    """Nor does it wait for the compiler, which is at work on the next stage, or hangs."""
    code, said = run_until("step:5", tmp_path / "run", signals="SIGINT,SIGINT")
    assert code == 130, said
    assert "goes on from the last checkpoint" in said
    assert "Traceback" not in said
    assert steps(tmp_path / "run") == [3, 4]
