"""Rules that end a stage before its last epoch, and the comparison of epochs they count with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import ClassVar, Literal, Protocol, TypeVar

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError


class HasValues(Protocol):
    """The validation metrics of an epoch."""

    @property
    def values(self) -> Mapping[str, float]:
        """Value of each metric, by name."""


Score = TypeVar("Score", bound=HasValues)

MONITORS = ("accuracy", "top5", "loss")
Monitor = str
"""Name of a metric: one of `MONITORS`, or of the recipe's metrics."""
Mode = Literal["min", "max"]


def default_mode(monitor: Monitor) -> Mode:
    """Returns `min` for the loss and `max` for accuracies and the recipe's metrics."""
    return "min" if monitor == "loss" else "max"


def check_monitor(monitor: Monitor, names: Sequence[str], place: str) -> None:
    """Raises RecipeError, which starts with the place, unless there is a metric of that name."""
    if monitor in names:
        return
    similar = get_close_matches(monitor, names, n=1)
    hint = f" Did you mean {similar[0]!r}?" if similar else ""
    raise RecipeError(
        f"{place}: monitor is {monitor!r}; the metrics are {', '.join(names)}.{hint} "
        "Recipe(metrics=('my_module:function',)) adds a function of yours."
    )


def is_better(
    score: HasValues, reference: HasValues, monitor: Monitor, mode: Mode, margin: float = 0
) -> bool:
    """Returns True if `score` beats `reference` by more than `margin`.

    A tie is not better, nor is NaN. Every number is better than NaN.

    Args:
      score: metrics of the new epoch.
      reference: metrics of the epoch to beat.
      monitor: the metric to compare.
      mode: whether a smaller (`min`) or a larger (`max`) value is better.
      margin: minimum difference, in units of the metric.
    """
    new, old = score.values[monitor], reference.values[monitor]
    if math.isnan(old):
        return not math.isnan(new)
    return bool(new + margin < old if mode == "min" else new - margin > old)


@checked(
    restore_best_weights="the next stage starts from the best epoch, see Stage(restore=...)",
    start_from_epoch="it is called min_epochs",
    verbose="the line that closes a stage states why it ended",
)
@dataclass(frozen=True)
class EarlyStop:
    """Ends a stage after `patience` epochs in a row without improvement.

    Counts as Keras and Lightning do. The first epoch is an improvement. A later epoch is one if it
    beats the last improvement by more than `min_delta`; a tie and NaN are none. After NaN, any
    number is an improvement.

    Attributes:
      monitor: metric on the validation images: `accuracy` or `top5` (from 0 to 1), `loss` (that of
        the stage), or the name of one of the recipe's metrics. The best epoch is also chosen by it,
        unless the stage sets `Stage.monitor`.
      patience: number of epochs.
      min_delta: smallest improvement that counts, in units of the metric.
      min_epochs: the stage trains at least this many epochs. Patience still counts from the start.
      mode: whether `min` or `max` is better; by default `min` for the loss, else `max`, also for
        metrics of the recipe.
      baseline: with `start`, the first epoch must improve on the score at the stage's start.
    """

    monitor: Monitor = "accuracy"
    patience: int = 3
    min_delta: float = 0.0
    min_epochs: int = 0
    mode: Mode | None = None
    baseline: Literal["start"] | None = None

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        wrong = []
        if self.patience < 1:
            wrong.append(f"patience is {self.patience}; it must be at least 1")
        if not self.min_delta >= 0:
            wrong.append(f"min_delta is {self.min_delta}; it must not be negative")
        if self.min_epochs < 0:
            wrong.append(f"min_epochs is {self.min_epochs}; it must not be negative")
        if wrong:
            raise RecipeError(f"EarlyStop: {'; '.join(wrong)}.")

    def count(
        self, score: Score, reference: Score, waited: int, *, epoch: int
    ) -> tuple[Score, int]:
        """Counts one epoch.

        Args:
          score: metrics of the epoch.
          reference: metrics of the last improvement; before the first, of the stage's start.
          waited: epochs since that improvement.
          epoch: number of the epoch within the stage, from 1.

        Returns:
          The new `(reference, waited)`.
        """
        mode = self.mode or default_mode(self.monitor)
        if epoch == 1 and self.baseline is None:
            return score, waited + 1 if math.isnan(score.values[self.monitor]) else 0
        if is_better(score, reference, self.monitor, mode, self.min_delta):
            return score, 0
        return reference, waited + 1

    def end_reason(self, waited: int, epoch: int) -> str:
        """Returns why the stage ends after this epoch; empty if it continues."""
        if waited < self.patience or epoch < self.min_epochs:
            return ""
        margin = f" by more than {self.min_delta:g}" if self.min_delta else ""
        plural = "s" * (waited > 1)
        return f"{self.monitor} has not improved{margin} for {waited} epoch{plural}"


@checked()
@dataclass(frozen=True)
class PlateauStop:
    """Ends a stage when its `ReduceLROnPlateau` schedule meets one plateau more than `reductions`.

    Counts plateaus as torch's scheduler does: `PlateauStop(0)` ends the stage at the first one.
    """

    reductions: int = 2

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.reductions < 0:
            raise RecipeError(
                f"PlateauStop: reductions is {self.reductions}; it must not be negative."
            )

    def end_reason(self, reductions: int) -> str:
        """Returns why the stage ends after this many plateaus; empty if it continues."""
        if reductions <= self.reductions:
            return ""
        return f"the learning rate met its plateau number {reductions}"
