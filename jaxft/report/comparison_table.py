"""Table and picture of a comparison of strategies."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxft.comparison import Rank


def comparison_table(ranks: Sequence[Rank]) -> Iterator[str]:
    """Yields the lines of a table, the best strategy first."""
    width = max(8, *(len(rank.strategy) for rank in ranks))
    line = f"  {{:{width}}}  {{:>8}}  {{:>13}}  {{:>18}}  {{:>7}}  {{:>7}}"
    yield line.format("strategy", "accuracy", "range", "to the best", "seconds", "trained")
    for rank in ranks:
        accuracies = [outcome.accuracy for outcome in rank.outcomes]
        seconds = [outcome.seconds for outcome in rank.outcomes if outcome.seconds is not None]
        difference = "-" if rank is ranks[0] else f"{rank.difference:+.4f}"
        if rank.interval:
            difference = "{:+.4f} to {:+.4f}".format(*rank.interval)
        yield line.format(
            rank.strategy,
            f"{rank.accuracy:.4f}",
            f"{min(accuracies):.4f}-{max(accuracies):.4f}",
            difference,
            f"{np.mean(seconds):.1f}" if seconds else "-",
            _short(rank.outcomes[0].trained),
        )


def _short(count: int) -> str:
    """Returns a count with three digits, such as 325 or 23.5M."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return str(count)


def draw_comparison(path: Path, ranks: Sequence[Rank], title: str) -> None:
    """Draws a row for each strategy: a dot for each seed, a bar at the mean.

    Args:
      path: the picture to write.
      ranks: the strategies, the best first.
      title: title of the picture.
    """
    figure = Figure(figsize=(8, 1.4 + 0.34 * len(ranks)), layout="constrained")
    axes = figure.add_subplot()
    for row, rank in enumerate(ranks):
        accuracies = [outcome.accuracy for outcome in rank.outcomes]
        axes.plot(accuracies, [row] * len(accuracies), "o", color="#0072b2", alpha=0.6)
        axes.plot(rank.accuracy, row, "|", color="black", markersize=18, markeredgewidth=2)
    axes.set_yticks(range(len(ranks)), [rank.strategy for rank in ranks])
    axes.invert_yaxis()
    axes.set_xlabel("validation accuracy (dots: seeds, bar: mean)")
    axes.grid(axis="x", alpha=0.3)
    axes.set_title(title)
    figure.savefig(path, dpi=120)
