"""Figures of an evaluation: confusion matrix and reliability diagram."""

import numpy as np
from jaxtyping import Bool, Float
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from jaxft.evaluation import Evaluation, calibration_bins
from jaxft.report.figure import ACCENT, INK, render, shorten

MAX_CLASSES = 30  # of a confusion matrix; more are illegible
_MAX_COUNTS = 12  # classes up to which the numbers are shown
# From transparent, so that the ground of the page shows.
_SHADES = LinearSegmentedColormap.from_list("shades", [f"{ACCENT}00", f"{ACCENT}ff"])


def confusion_figure(scores: Evaluation) -> tuple[str, bytes]:
    """Returns the confusion matrix, shaded by the share of each class's images."""
    counts = np.array(scores.confusion)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [shorten(each.name, 14) for each in scores.classes]
    size = len(names)

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.imshow(shares, cmap=_SHADES, vmin=0, vmax=1, interpolation="none")
        axes.set_xticks(
            np.arange(size), names, rotation=90 if size * max(map(len, names)) > 36 else 0
        )
        axes.set_yticks(np.arange(size), names)
        axes.tick_params(length=0, labelsize=8 if size <= 16 else 5.5)
        axes.set_xlabel("prediction")
        axes.set_ylabel("class")
        axes.spines[:].set_visible(True)
        if size <= _MAX_COUNTS:
            for row, column in np.ndindex(size, size):
                axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center",
                          weight="bold" if row == column else "normal")  # fmt: skip

    side = min(4.2, 2.2 + 0.3 * size)
    return render(side, side, draw)


def frequent_errors(scores: Evaluation, count: int) -> list[tuple[int, str, str]]:
    """Returns the most frequent errors as (images, class, prediction)."""
    counts = np.array(scores.confusion)
    np.fill_diagonal(counts, 0)
    order = np.argsort(-counts, axis=None, kind="stable")[:count]
    pairs = np.stack(np.unravel_index(order, counts.shape), -1).tolist()
    names = [each.name for each in scores.classes]
    return [(int(counts[i, j]), names[i], names[j]) for i, j in pairs if counts[i, j]]


def reliability_figure(
    confidence: Float[np.ndarray, " n"], hits: Bool[np.ndarray, " n"]
) -> tuple[str, bytes]:
    """Returns the reliability diagram: accuracy by confidence, and the number of images."""
    images, confidences, correct = calibration_bins(confidence, hits)
    filled = images > 0
    x, y = confidences[filled] / images[filled], correct[filled] / images[filled]
    edges = np.linspace(0, 1, len(images) + 1)

    def draw(figure: Figure) -> None:
        axes, histogram = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        axes.plot((0, 1), (0, 1), color=INK, linewidth=0.8, linestyle=(0, (3, 3)))
        # The area of a point is the number of images, as a bin of few has no certain accuracy.
        axes.scatter(x, y, 8 + 120 * images[filled] / images.max(), color=ACCENT)
        axes.set_ylim(-0.02, 1.05)
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.25, color=INK, linewidth=0.5)
        histogram.stairs(images, edges, fill=True, color=ACCENT)
        histogram.set_ylabel("images")
        histogram.set_xlabel("confidence (probability of the predicted class)")
        histogram.set_xlim(0, 1)

    return render(4.2, 3.6, draw)
