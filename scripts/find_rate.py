"""Finds a learning rate: a stage's first steps, at rates that rise until its loss has diverged.

    python scripts/find_rate.py CONFIG --out DIR [--stage NAME] [any field of the recipe]

CONFIG is a recipe as for scripts/finetune.py. The steps are the stage's own (what trains, its norm
layers, loss and optimizer), from the weights that the recipe starts with, whichever stage it is: to
try a later one from where an earlier has ended, give `--weights RUN --head keep`. All rates rise
together, the highest of them over the given range. Nothing is kept but DIR/curve.csv and
DIR/rates.png.
"""

if __name__ == "__main__":
    from stop_at_once import stop_at_once

    stop_at_once()  # before what takes seconds to import

import argparse

from jaxft import Recipe
from jaxft.checkpoint.atomic import anywhere
from jaxft.command_line import check_folder, read_with, run
from jaxft.report.lr_plot import draw, rate_table, write_curve
from jaxft.train.compiled_stage import keep_programs
from jaxft.train.lr_finder import highest, named, ramp, range_test, trial


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--out", metavar="DIR", required=True)
    parser.add_argument("--stage", metavar="NAME", help="which stage; default: the first")
    parser.add_argument("--low", type=float, default=1e-7, help="the first rate; default: 1e-7")
    parser.add_argument("--high", type=float, default=10.0, help="the last rate; default: 10")
    parser.add_argument("--steps", type=int, default=100, help="at most; default: 100")
    known, options = parser.parse_known_args(arguments)
    keep_programs()
    known.out = anywhere(known.out)
    check_folder(known.out)
    find(read_with(known.config, options), known)


def find(recipe: Recipe, known: argparse.Namespace) -> None:
    low, high = known.low, known.high
    stage = named(recipe, known.stage)
    tried = trial(recipe, ramp(stage, low=low, high=high, steps=known.steps))
    rates = {g: rate / low * highest(stage) for g, rate in tried.program.plan.rates.items()}
    curve = range_test(tried, low=low, high=high)
    known.out.mkdir(parents=True, exist_ok=True)
    write_curve(known.out / "curve.csv", curve)
    smoothed = curve.smoothed
    print(
        f"Stage {stage.name!r} of {recipe.model}: {len(smoothed)} of {known.steps} steps, rates "
        f"from {low:g} to {curve.rates[-1]:.2g}\n"
        f"smoothed loss {smoothed[0]:.4f} at first, {smoothed.min():.4f} at best, "
        f"{smoothed[-1]:.4f} at last\n"
    )
    suggestions = curve.suggestions()
    print(*rate_table(rates, suggestions), sep="\n")
    draw(known.out / "rates.png", curve, suggestions, f"{recipe.model}, stage {stage.name!r}")
    print(f"\nCurve    {known.out / 'curve.csv'}\nPicture  {known.out / 'rates.png'}")


if __name__ == "__main__":
    run(main)
