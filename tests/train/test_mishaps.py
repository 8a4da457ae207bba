"""Mishaps of a run: a full disk, damaged files, a second run in its folder."""

import os
import signal

import pytest
from faults import before
from mortal import (
    ONE_STAGE,
    RECIPE,
    assert_same_end,
    begin_until,
    killed,
    odd_names,
    saving_stage_ends_only,
    steps,
    train,
    train_to_end,
)

from jaxft import CheckpointError, RecipeError, finetune
from jaxft.report.console import Console

pytestmark = pytest.mark.usefixtures("shared_programs")


@pytest.mark.slow
def test_full_disk_keeps_earlier_checkpoints(whole, disk):
    workdir = disk.folder / "run"
    # The arrays of step 12 are on the disk then, and those of step 15 do not fit any more.
    filled = before("seal", lambda *_, **__: disk.fill(but=2**19), at=12)
    with filled, pytest.raises(CheckpointError, match=r"are free\. All up to step 12 is safe"):
        train(workdir)
    assert steps(workdir)[-1] == 12
    disk.free()
    train_to_end(workdir)
    assert_same_end(workdir, whole)
    assert odd_names(workdir) == []


@pytest.mark.slow
def test_run_resumes_from_checkpoint_before_a_damaged_one(whole, tmp_path, capsys):
    workdir = tmp_path / "run"
    with killed("step", 14):
        train(workdir)
    newest = workdir / "checkpoints" / "12"
    largest = max(newest.rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    with saving_stage_ends_only():
        finetune(RECIPE, workdir, console=Console())
    said = capsys.readouterr().out.replace("\n", " ")
    assert "/12 is damaged: " in said
    assert "The run continues from step 9: stage 'late'" in said
    assert_same_end(workdir, whole)
    assert odd_names(workdir) == ["corrupt-12"]


@pytest.mark.slow
def test_second_run_in_workdir_is_refused(one_stage, tmp_path):
    workdir = tmp_path / "run"
    with begin_until("step", 5, workdir, ONE_STAGE, signals="SIGSTOP") as first:
        _, status = os.waitpid(first.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        try:
            with pytest.raises(RecipeError, match=f"another process is training in {workdir}"):
                train(workdir, ONE_STAGE)
        finally:
            first.send_signal(signal.SIGCONT)
        _, errors = first.communicate(timeout=300)
    assert first.returncode == 0, errors
    assert_same_end(workdir, one_stage)
