"""Writes the report of a run as one HTML page, or compares several runs.

    jaxft report runs/ants
    jaxft report runs/ants runs/bees [--out comparison.html]

For one run, ended or not, writes WORKDIR/report.html and its pictures as PNG files in
WORKDIR/report/: curves, stages, confusion matrix, the worst mistakes, calibration, augmented
images, time, recipe and versions. It evaluates the validation images once. A run writes its report
at its end too.

For several runs, writes a page with their scores, their curves in one plot, and the differences of
their recipes from the first one's.
"""

from collections.abc import Sequence
from functools import partial

from jaxft.checkpoint import atomic
from jaxft.cli.command_setup import check_writable, command_parser, run_until_signal
from jaxft.cli.program_cache import keep_programs
from jaxft.errors import RecipeError
from jaxft.report.comparison_page import comparison_page
from jaxft.report.run_record import read_record
from jaxft.report.run_report import reopened_report
from jaxft.report.write_report import write_report


def run(arguments: Sequence[str], program: str = "jaxft report") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_report, arguments, program))


def _report(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft report", program)
    parser.add_argument("workdirs", metavar="WORKDIR", nargs="+")
    parser.add_argument(
        "--out", metavar="FILE", help="page of several runs; default: comparison.html"
    )
    known = parser.parse_args(arguments)
    workdirs = [atomic.anywhere(workdir) for workdir in known.workdirs]
    records = [read_record(workdir) for workdir in workdirs]
    if len(records) > 1:
        out = atomic.anywhere(known.out or "comparison.html")
        check_writable(out.parent)
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(out, comparison_page(records))
        print(f"Comparison  {out}")
        return
    if known.out:
        raise RecipeError("--out names the page of several runs; that of one is in its WORKDIR.")
    check_writable(workdirs[0])
    keep_programs()
    report = reopened_report(records[0], workdirs[0])
    for problem in report.problems:
        print(f"{problem}\nThe report leaves out what needs it.")
    print(f"Report  {write_report(workdirs[0], report)}")
