"""What ends a stage before its epochs are over."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError

Monitor = Literal["accuracy", "top5", "loss"]
Mode = Literal["min", "max"]


def default_mode(monitor: Monitor) -> Mode:
    """Returns `min` for a loss, `max` for an accuracy."""
    return "min" if monitor == "loss" else "max"


@checked(
    restore_best_weights="the best epoch goes on to the next stage by default, Stage(hand_on=...)",
    start_from_epoch="it is called min_epochs",
    verbose="the line that closes a stage says why it ended",
)
@dataclass(frozen=True)
class EarlyStop:
    """Ends a stage once `patience` epochs in a row have not improved.

    Counts as Keras, Lightning and torch's usual loops do: the first epoch is an improvement, a
    later one if it is strictly better, by more than `min_delta`, than the last that was. A tie is
    no improvement and NaN never is one; any number is an improvement on NaN alone.

    Attributes:
      monitor: metric on the validation images; accuracies from 0 to 1, the loss in nats. The best
        epoch is chosen by it too, unless the stage has a `monitor` of its own.
      patience: epochs.
      min_delta: in units of what is monitored; less is no improvement.
      min_epochs: the stage has at least as many; patience is counted from its start all the same.
      mode: whether `min` or `max` is better; by default `min` for a loss, else `max`.
      baseline: with `start`, the first epoch must improve on the stage's start.
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


@checked()
@dataclass(frozen=True)
class Plateau:
    """Ends a stage when its `ReduceLROnPlateau` asks for one reduction more than `reductions`.

    Plateaus are counted as torch's scheduler counts them, so `Plateau(0)` ends with the first.
    """

    reductions: int = 2

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.reductions < 0:
            raise RecipeError(f"Plateau: reductions is {self.reductions}; it must not be negative.")
