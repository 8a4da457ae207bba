"""Averages the weights of several runs: a greedy soup (Wortsman et al. 2022).

    jaxft soup runs/ants-0 runs/ants-1 --workdir runs/ants-soup [--data DATA]

RUN is the folder of a run that has ended. All runs have the same network, pretrained weights,
classes and validation images, and differ in seed, learning rate or augmentation. Starting from the
most accurate, each run joins the average unless the validation accuracy falls. Statistics of norm
layers that differ between the runs are computed again on the training images of the first.

DATA is a folder of class folders or data as in a recipe; default: the images of the first run.
`jaxft predict`, `evaluate` and `export` take DIR as the folder of a run.
"""

from collections.abc import Sequence
from functools import partial

from jaxft.checkpoint.atomic import anywhere
from jaxft.cli.command_setup import check_writable, command_parser, run_until_signal
from jaxft.cli.data_recipe import data_spec
from jaxft.cli.program_cache import keep_programs
from jaxft.greedy_soup import soup
from jaxft.report.console import Console


def run(arguments: Sequence[str], program: str = "jaxft soup") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_soup, arguments, program))


def _soup(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft soup", program)
    parser.add_argument("runs", metavar="RUN", nargs="+")
    parser.add_argument("--workdir", metavar="DIR", required=True)
    parser.add_argument("--data", metavar="DATA", help="images in place of the first run's")
    known = parser.parse_args(arguments)
    keep_programs()
    check_writable(anywhere(known.workdir))
    console = Console()
    data = known.data and data_spec(known.data)
    result = soup(known.runs, known.workdir, data=data, console=console)
    kept = sum(each.is_kept for each in result.ingredients)
    score = result.score
    console.row(
        f"\nSoup of {kept} runs: accuracy {score.accuracy:.4f}, loss {score.loss:.4f}"
        if kept > 1
        else f"\nNo average is as accurate as {result.ingredients[0].run} alone, which is kept."
    )
    console.row(f"Weights  {result.weights} (model.json beside it)")
