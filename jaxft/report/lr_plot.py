"""A range test as a file of numbers, a picture, and a table of the rates that it suggests."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from jaxft.train.lr_finder import Curve


def write_curve(path: Path, curve: Curve) -> None:
    """A row a step: its number, the highest group's rate, the batch's loss, the smoothed one."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("step", "rate", "loss", "smoothed"))
        numbers = zip(curve.rates, curve.losses, curve.smoothed, strict=True)
        table.writerows((step, *(f"{x:.9g}" for x in row)) for step, row in enumerate(numbers))


def draw(path: Path, curve: Curve, suggestions: Mapping[str, float], title: str) -> None:
    """Losses over rates, the latter on a logarithmic axis, with the suggestions marked on it."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    rates, smoothed = np.asarray(curve.rates), curve.smoothed
    axes.plot(rates, curve.losses, ".", color="0.7", markersize=5, label="each batch")
    axes.plot(rates, smoothed, color="black", linewidth=1.8, label="smoothed")
    # Apart in lightness and in dashes too.
    looks = (("#0072b2", "-"), ("#d55e00", "--"), ("#009e73", "-."), ("#cc79a7", ":"))
    for (rule, rate), (color, dashes) in zip(suggestions.items(), looks, strict=False):
        axes.axvline(rate, color=color, linestyle=dashes, label=f"{rule}: {rate:.1e}")
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (of the highest group)")
    axes.set_ylabel("training loss")
    # What comes after the loss has blown up would flatten all before.
    finite = smoothed[np.isfinite(smoothed)]
    if len(finite):
        low, high = finite.min(), min(finite.max(), 2 * finite[0])
        axes.set_ylim(low - 0.4 * (high - low) - 1e-9, high + 0.4 * (high - low) + 1e-9)
    axes.grid(alpha=0.3)
    axes.set_title(title)
    axes.legend(loc="lower left")
    figure.savefig(path, dpi=120)


def rate_table(rates: Mapping[str, float], suggestions: Mapping[str, float]) -> Iterator[str]:
    """Lines: each group's rate as the recipe has it, and by each rule in the same ratios."""
    top = max(rates.values())
    line = "  {:22}" + "  {:>12}" * (1 + len(suggestions))
    yield line.format("group", "recipe", *suggestions).rstrip()
    for group, rate in rates.items():
        scaled = (f"{suggestion * rate / top:.1e}" for suggestion in suggestions.values())
        name = group if len(group) <= 22 else group[:19] + "..."
        yield line.format(name, f"{rate:.1e}", *scaled)
