"""Saves a learning rate range test as CSV and as a plot, and formats its suggestions."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxft.lr_finder import Curve


def write_curve(path: Path, curve: Curve) -> None:
    """Writes a CSV file with one row per step.

    The columns are the step, the largest learning rate of all groups, the batch's loss and the
    smoothed loss.
    """
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("step", "lr", "loss", "smoothed"))
        rows = zip(curve.lrs, curve.losses, curve.smoothed, strict=True)
        table.writerows((step, *(f"{x:.9g}" for x in row)) for step, row in enumerate(rows))


def draw(path: Path, curve: Curve, suggestions: Mapping[str, float], title: str) -> None:
    """Plots losses over learning rates, on a logarithmic axis, and marks the suggestions.

    Args:
      path: the picture to write.
      curve: the range test.
      suggestions: suggested learning rate per rule.
      title: title of the plot.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    lrs, smoothed = np.asarray(curve.lrs), curve.smoothed
    axes.plot(lrs, curve.losses, ".", color="0.7", markersize=5, label="each batch")
    axes.plot(lrs, smoothed, color="black", linewidth=1.8, label="smoothed")
    # Colours that also differ in lightness, and dashes, serve colour-blind readers.
    styles = (("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", "-."), ("#cc79a7", ":"))
    for (rule, lr), (color, dashes) in zip(suggestions.items(), styles, strict=False):
        axes.axvline(lr, color=color, linestyle=dashes, label=f"{rule}: {lr:.1e}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (of the highest group)")
    axes.set_ylabel("training loss")
    # The limit cuts off a diverged loss, which would flatten the rest of the curve.
    finite = smoothed[np.isfinite(smoothed)]
    if len(finite):
        low, high = finite.min(), min(finite.max(), 2 * finite[0])
        axes.set_ylim(low - 0.4 * (high - low) - 1e-9, high + 0.4 * (high - low) + 1e-9)
    axes.grid(alpha=0.3)
    axes.set_title(title)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def lr_table(lrs: Mapping[str, float], suggestions: Mapping[str, float]) -> Iterator[str]:
    """Yields the lines of a table of learning rates.

    Each line holds a group's learning rate in the recipe and by each rule. A rule scales all groups
    by the same factor, so that the largest learning rate is the suggested one.

    Args:
      lrs: learning rate of each group in the recipe.
      suggestions: suggested learning rate per rule.
    """
    largest = max(lrs.values())
    line = "  {:22}" + "  {:>12}" * (1 + len(suggestions))
    yield line.format("group", "recipe", *suggestions).rstrip()
    for group, lr in lrs.items():
        scaled = (f"{suggestion * lr / largest:.1e}" for suggestion in suggestions.values())
        name = group if len(group) <= 22 else group[:19] + "..."
        yield line.format(name, f"{lr:.1e}", *scaled)
