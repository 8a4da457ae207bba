"""Curves of a run over its stages, and of several runs in one plot."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from jaxft.report.figure import COLORS, INK, render, shorten
from jaxft.report.run_record import PHASES, Row, RunRecord, StageSeconds

_SIZE = 4.2, 2.7  # inches
_MAX_LEGEND = 8  # groups that are named
_MAX_NAMED_STAGES = 4  # more are numbered


def curves(record: RunRecord) -> dict[str, tuple[str, bytes]]:
    """Returns the figures of a run by name, as SVG and PNG; none without epochs.

    The axis is the epochs of all stages; of the figure `wise`, the share of a stage's end.
    """
    rows = record.rows
    if not rows:
        return {}
    names = ["loss", "accuracy", *_custom(rows)]
    figures = {name: _metric(record, name) for name in names}
    if any(row["lr"] for row in rows):
        figures["lr"] = render(*_SIZE, lambda figure: _lr(figure, record))
    if any("wise" in row for row in rows):
        figures["wise"] = render(*_SIZE, lambda figure: _averages(figure, record))
    return figures


def compared(records: Mapping[str, RunRecord], metric: str) -> tuple[str, bytes]:
    """Returns the curves of a validation metric in several runs, by name."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for i, (name, record) in enumerate(records.items()):
            values = _values(record.rows, f"val_{metric}")
            style = ("-", "--", "-.", ":")[i // len(COLORS) % 4]
            _line(axes, values, COLORS[i % len(COLORS)], label=shorten(name, 28), linestyle=style)
        axes.set_ylabel(f"validation {metric}")
        _finish(axes, max(len(record.rows) for record in records.values()))
        figure.legend(loc="outside lower center", ncols=2)

    return render(_SIZE[0], _SIZE[1] + 0.12 * len(records), draw)


def seconds_figure(seconds: Mapping[str, StageSeconds]) -> tuple[str, bytes]:
    """Returns the seconds of each stage as stacked bars, without those of restarts."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        ends = np.zeros(len(seconds))
        names = [shorten(name, 16) for name in seconds]
        for color, (phase, text) in zip(COLORS, PHASES.items(), strict=False):
            widths = np.array([each.phases[phase] for each in seconds.values()])
            if widths.any():
                axes.barh(np.arange(len(names)), widths, left=ends, color=color, label=text)
            ends += widths
        axes.set_yticks(np.arange(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.set_xlabel("seconds")
        figure.legend(loc="outside lower center", ncols=2)

    return render(4.2, 1.5 + 0.25 * len(seconds), draw)


def _metric(record: RunRecord, name: str) -> tuple[str, bytes]:
    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for kind, color, label in (
            ("train", COLORS[1], "training"),
            ("val", COLORS[0], "validation"),
        ):
            _line(axes, _values(record.rows, f"{kind}_{name}"), color, label=label)
        axes.set_ylabel(name)
        _stages(axes, record)
        _finish(axes, len(record.rows))
        axes.legend()

    return render(*_SIZE, draw)


def _lr(figure: Figure, record: RunRecord) -> None:
    axes, rows = figure.add_subplot(), record.rows
    groups = list(dict.fromkeys(group for row in rows for group in row["lr"]))
    for i, group in enumerate(groups):
        lrs = _values([row["lr"] for row in rows], group)
        label = shorten(group, 20) if i < _MAX_LEGEND else None
        if i == _MAX_LEGEND - 1 and len(groups) > _MAX_LEGEND:
            label = f"and {len(groups) - i} more"
        # Groups with equal learning rates stay visible behind each other.
        width = 1.2 + max(0, min(len(groups), 4) - 1 - i)
        color, edges = COLORS[i % len(COLORS)], np.arange(len(rows) + 1) + 0.5
        axes.stairs(lrs, edges, baseline=None, color=color, label=label, linewidth=width)
    positive = [lr for row in rows for lr in row["lr"].values() if lr]
    if positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log")
    axes.set_ylabel("learning rate")
    _stages(axes, record)
    _finish(axes, len(rows))
    axes.legend(ncols=2 if len(groups) > 4 else 1)


def _averages(figure: Figure, record: RunRecord) -> None:
    """Draws the accuracy of the averages of each stage's start and end; the chosen is marked."""
    axes = figure.add_subplot()
    curves = {row["stage"]: row["wise"] for row in record.rows if "wise" in row}
    for i, (stage, curve) in enumerate(curves.items()):
        color, values = COLORS[i % len(COLORS)], curve["val_accuracy"]
        label = f"{shorten(stage, 20)}, alpha {curve['alpha']:g}"
        axes.plot(list(map(float, values)), list(values.values()), color=color, label=label)
        chosen = values[str(curve["alpha"])]
        axes.plot(curve["alpha"], chosen, "o", color=color)
    axes.set_xlabel("alpha: share of the stage's end in the average with its start")
    axes.set_ylabel("validation accuracy")
    axes.grid(alpha=0.25, color=INK, linewidth=0.5)
    axes.legend()


def _line(axes: Axes, values: np.ndarray, color: str, **options: Any) -> None:
    """Draws a curve over the epochs; those that are not finite are marked at the bottom."""
    epochs = np.arange(1, len(values) + 1)
    marker = "o" if len(values) <= 12 else None
    axes.plot(epochs, values, color=color, marker=marker, markersize=3, **options)
    missing = epochs[~np.isfinite(values)]
    if len(missing) and options.get("label") in ("training", "validation"):
        bottom = axes.get_xaxis_transform()
        axes.plot(missing, np.zeros(len(missing)), "x", color=color, transform=bottom,
                  markersize=4, clip_on=False, label=f"{options['label']}, not finite")  # fmt: skip


def _stages(axes: Axes, record: RunRecord) -> None:
    """Marks the boundaries between stages and names the stages."""
    first = 0.5
    for number, (name, rows) in enumerate(record.stages.items(), 1):
        if number > 1:
            axes.axvline(first, color=INK, linewidth=0.7, linestyle=(0, (3, 3)), alpha=0.6)
        text = shorten(name, 10) if len(record.stages) <= _MAX_NAMED_STAGES else str(number)
        middle = first + len(rows) / 2
        axes.text(middle, 1.02, text, transform=axes.get_xaxis_transform(), ha="center",
                  va="bottom")  # fmt: skip
        first += len(rows)


def _finish(axes: Axes, epochs: int) -> None:
    axes.set_xlim(0.5, epochs + 0.5)
    axes.set_xlabel("epoch, over all stages" if epochs > 1 else "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25, color=INK, linewidth=0.5)


def _values(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([math.nan if row.get(name) is None else row[name] for row in rows], float)


def _custom(rows: Sequence[Row]) -> list[str]:
    """Returns the names of the recipe's own metrics."""
    names = [name.removeprefix("val_") for name in rows[-1] if name.startswith("val_")]
    return [name for name in names if name not in ("loss", "accuracy", "top5")]
