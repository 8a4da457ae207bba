"""Finds a learning rate: trains a few steps while it rises, until the loss diverges.

    jaxft find-lr CONFIG --out DIR [--stage NAME] [recipe options]

CONFIG is a recipe as for `jaxft finetune`. The steps are steps of the stage, with its trained
layers, norm layers, loss and optimizer. They start from the weights of the recipe, also for a later
stage; to start from the end of an earlier run, add `--weights RUN --head keep`. All learning rates
of the stage rise together; the highest one covers the given range. Writes DIR/curve.csv and
DIR/lr.png.
"""

import argparse
from collections.abc import Sequence
from functools import partial

from jaxft.checkpoint.atomic import anywhere
from jaxft.cli.command_setup import check_writable, command_parser, run_until_signal
from jaxft.cli.program_cache import keep_programs
from jaxft.cli.recipe_options import read_recipe
from jaxft.lr_finder import highest, named, ramp, range_test, trial
from jaxft.recipe import Recipe
from jaxft.report.lr_plot import draw, lr_table, write_curve


def run(arguments: Sequence[str], program: str = "jaxft find-lr") -> int:
    """Runs the command; returns its exit code."""
    return run_until_signal(partial(_main, arguments, program))


def _main(arguments: Sequence[str], program: str) -> None:
    parser = command_parser(__doc__, "jaxft find-lr", program, allow_abbrev=False)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--out", metavar="DIR", required=True)
    parser.add_argument("--stage", metavar="NAME", help="default: the first")
    parser.add_argument("--low", type=float, default=1e-7, help="first learning rate (1e-7)")
    parser.add_argument("--high", type=float, default=10.0, help="last learning rate (10)")
    parser.add_argument("--steps", type=int, default=100, help="at most; default: 100")
    known, options = parser.parse_known_args(arguments)
    keep_programs()
    known.out = anywhere(known.out)
    check_writable(known.out)
    _find_lr(read_recipe(known.config, options, program), known)


def _find_lr(recipe: Recipe, known: argparse.Namespace) -> None:
    low, high = known.low, known.high
    stage = named(recipe, known.stage)
    rising = trial(recipe, ramp(stage, low=low, high=high, steps=known.steps))
    lrs = {group: lr / low * highest(stage) for group, lr in rising.program.plan.lr.items()}
    curve = range_test(rising, low=low, high=high)
    known.out.mkdir(parents=True, exist_ok=True)
    write_curve(known.out / "curve.csv", curve)
    smoothed = curve.smoothed
    print(
        f"Stage {stage.name!r} of {recipe.model}: {len(smoothed)} of {known.steps} steps, lr "
        f"from {low:g} to {curve.lrs[-1]:.2g}\n"
        f"smoothed loss {smoothed[0]:.4f} at first, {smoothed.min():.4f} at best, "
        f"{smoothed[-1]:.4f} at last\n"
    )
    suggestions = curve.suggestions()
    print(*lr_table(lrs, suggestions), sep="\n")
    draw(known.out / "lr.png", curve, suggestions, f"{recipe.model}, stage {stage.name!r}")
    print(f"\nCurve    {known.out / 'curve.csv'}\nPicture  {known.out / 'lr.png'}")
