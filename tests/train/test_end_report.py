"""The report that a run writes at its end, and `jaxft report` for the same run."""

import dataclasses
import errno
import re
import shutil
from io import BytesIO
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from browser import problems
from commands import call
from mortal import ONE_STAGE, QUIET, saving_stage_ends_only
from PIL import Image

from jaxft import LinearProbe, Stage, data, finetune
from jaxft.data import Splits
from jaxft.report.console import Console

END_REPORTS = True
STAGES = (Stage("probe", {"fc": LinearProbe(c=(1.0,))}), Stage("all", {"fc": 1e-3, "*": 1e-4}, 2))
RECIPE = dataclasses.replace(ONE_STAGE, stages=STAGES, checkpoint_steps=0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder and the result of a run with a report."""
    folder = tmp_path_factory.mktemp("report") / "run"
    with saving_stage_ends_only():
        return folder, finetune(RECIPE, folder, console=QUIET)


@pytest.mark.smoke
def test_finetune_writes_report(run, tmp_path):
    folder, result = run
    assert result.report == folder / "report.html"
    page = result.report.read_text()
    assert problems({"run": page}, tmp_path) == []
    assert len(page) < 3 * 2**20
    assert f"{result.score.accuracy:.4f}" in page
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == [
        "Curves", "Stages", "Classes", "Worst mistakes", "Least certain", "Calibration",
        "Augmented images", "Time", "Recipe", "Versions",
    ]  # fmt: skip
    pictures = {path.stem: Image.open(BytesIO(path.read_bytes())) for path in pngs(folder)}
    assert pictures.keys() == {
        "loss", "accuracy", "lr", "confusion", "mistakes", "least_certain", "calibration",
        "augmented", "time",
    }  # fmt: skip
    assert all(np.ptp(np.asarray(picture.convert("L"))) > 0 for picture in pictures.values())


@pytest.mark.slow
def test_report_command_repeats_report_of_run(run, tmp_path):
    folder = shutil.copytree(run[0], tmp_path / run[0].name)
    (folder / "report.html").unlink()
    shutil.rmtree(folder / "report")
    done = call("report", folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "report.html").read_text() == run[1].report.read_text()
    assert [path.name for path in pngs(folder)] == [path.name for path in pngs(run[0])]


@pytest.mark.slow
def test_report_command_compares_runs(run, tmp_path):
    other = shutil.copytree(run[0], tmp_path / "other")
    out = tmp_path / "new" / "both.html"
    done = call("report", run[0], other, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    page = out.read_text()
    assert problems({"both": page}, tmp_path) == []
    assert "Their recipes give the same result." in page


@pytest.mark.slow
def test_report_command_without_the_images_says_so(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
    given = data.arrays(pixels, np.arange(12) % 3, ("a", "b", "c"))
    recipe = dataclasses.replace(
        ONE_STAGE, data="digits:5-7", shots=None, train_split=None, val_split=None
    )
    with saving_stage_ends_only():
        result = finetune(recipe, tmp_path / "run", data=Splits(given, given), console=QUIET)
    assert "Worst mistakes" in result.report.read_text()
    done = call("report", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "no longer has the images that the run validated with" in done.stdout
    assert "no longer has the images" in result.report.read_text()
    assert [path.stem for path in pngs(tmp_path / "run")] == ["accuracy", "loss", "lr", "time"]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["run_report.labelled_logits", "write_report.run_page"])
def test_error_in_report_leaves_the_results(target, run, tmp_path, capsys):
    """The run has ended; the same call hands its result back and writes the report again."""
    folder = shutil.copytree(run[0], tmp_path / "run")
    error = OSError(errno.ENOSPC, "No space left on device", "report.html")
    with mock.patch(f"jaxft.report.{target}", side_effect=error):
        again = finetune(RECIPE, folder, console=Console())
    assert again.report is None
    assert again.score == run[1].score
    assert again.weights.read_bytes() == run[1].weights.read_bytes()
    text = " ".join(capsys.readouterr().out.split())
    message = (
        "The report is not written: OSError: [Errno 28] No space left on device: 'report.html'"
    )
    assert text.endswith(message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "CheckpointError: nowhere holds no run with a checkpoint"),
        ([".", "nowhere"], "CheckpointError: . holds no run with a checkpoint"),
    ],
)
def test_report_command_reports_wrong_folders(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("report", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert not list(tmp_path.iterdir())


def pngs(folder: Path):
    return sorted((folder / "report").iterdir())
