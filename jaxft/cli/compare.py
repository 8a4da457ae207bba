"""Compares fine-tuning strategies on your images, over seeds.

    jaxft compare DATA --workdir DIR [--strategies lp-ft full] [recipe options]

DATA is a folder of class folders, a CSV file or data as in a recipe; or a recipe file, whose stages
are not used. By default all strategies run that the network allows, 15 for most ResNets, each with
three seeds; all options of `jaxft finetune DATA` apply. The same command resumes an interrupted
comparison.

Prints the strategies with mean and range of their accuracy, the 95 % confidence interval of the
difference to the best over the same seeds, seconds per run, and the number of parameters that
train. Writes DIR/best.yaml, the recipe of the best, and DIR/comparison.png. Weights are not kept:
`jaxft finetune DIR/best.yaml` trains them.

The best of several strategies looks better on the images that chose it than on new ones: keep a
test set apart, and run `jaxft evaluate` on it once.
"""

from collections.abc import Sequence
from functools import partial

from jaxft.checkpoint.atomic import anywhere
from jaxft.cli.command_setup import (
    check_writable,
    command_parser,
    count_argument,
    report_errors,
)
from jaxft.cli.data_recipe import add_strategy_options, base_recipe
from jaxft.cli.program_cache import keep_programs
from jaxft.comparison import compare
from jaxft.default_stages import EPOCHS, LR
from jaxft.report.comparison_table import comparison_table, draw_comparison
from jaxft.report.console import Console


def run(arguments: Sequence[str], program: str = "jaxft compare") -> int:
    """Runs the command; returns its exit code."""
    return report_errors(partial(_compare, arguments, program))


def _compare(arguments: Sequence[str], program: str) -> int:
    parser = command_parser(__doc__, "jaxft compare", program, allow_abbrev=False)
    parser.add_argument("data", metavar="DATA")
    parser.add_argument("--workdir", metavar="DIR", required=True)
    parser.add_argument("--strategies", nargs="+", metavar="NAME", default=(), help="default: all")
    parser.add_argument(
        "--seeds", type=count_argument, default=3, metavar="N", help="number of seeds; default: 3"
    )
    add_strategy_options(parser)
    known, options = parser.parse_known_args(arguments)
    keep_programs()
    workdir = anywhere(known.workdir)
    check_writable(workdir)
    recipe, console = base_recipe(known.data, options, program), Console()
    ranks = compare(
        recipe,
        workdir,
        strategies=known.strategies,
        seeds=known.seeds,
        lr=LR if known.lr is None else known.lr,
        epochs=known.epochs or EPOCHS,
        console=console,
    )
    console.row("")
    for line in comparison_table(ranks):
        console.row(line)
    draw_comparison(workdir / "comparison.png", ranks, f"{recipe.model}, {recipe.data}")
    console.row(f"\nRecipe   {workdir / 'best.yaml'} ({ranks[0].strategy})")
    console.row(f"Picture  {workdir / 'comparison.png'}")
    return 0
