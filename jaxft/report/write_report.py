"""Writes the report of a run, `report.html` and the PNG files in `report/`."""

from contextlib import suppress
from pathlib import Path

from jaxft.checkpoint import atomic
from jaxft.report.run_page import run_page
from jaxft.report.run_report import RunReport

PAGE, PICTURES = "report.html", "report"


def write_report(workdir: Path, report: RunReport) -> Path:
    """Writes the report of a run into its folder; returns the path of the page.

    Raises:
      OSError: the folder cannot be written.
    """
    page, pictures = run_page(report)
    folder = workdir / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.png"):
        if old.name not in pictures:  # of an earlier report
            with suppress(OSError):
                old.unlink()
    for name, content in pictures.items():
        atomic.write(folder / name, content)
    atomic.write(workdir / PAGE, page)
    return workdir / PAGE
