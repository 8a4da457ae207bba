"""Stages: what trains, at which rate, for how long. Plain values; `groups` makes them a plan."""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import optax

from jaxft.errors import RecipeError
from jaxft.labels import Pattern, show
from jaxft.optim import Optimizer, Rule
from jaxft.plateau import ReduceLROnPlateau
from jaxft.schedules import ClosedForm, Constant


@dataclass(frozen=True)
class EarlyStop:
    """Ends a stage once `patience` epochs in a row have not improved on its best."""

    monitor: Literal["accuracy", "loss"] = "accuracy"
    patience: int = 3

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise RecipeError(f"EarlyStop: patience is {self.patience}; it must be at least 1.")


@dataclass(frozen=True)
class Update:
    """How a group trains, where a rate alone does not say it.

    Attributes:
      lr: the base learning rate.
      schedule: what becomes of it within the stage; else the stage's.
      optimizer: one of ours, or any optax transform that gives the update before the rate is
        applied (`optax.scale_by_lion()`); else the stage's.
      weight_decay: replaces that of the optimizer.
    """

    lr: float
    schedule: ClosedForm | ReduceLROnPlateau | None = None
    optimizer: Rule | None = None
    weight_decay: float | None = None


@dataclass(frozen=True)
class Stage:
    """What trains, at which rate, for how long, and how it ends.

    Attributes:
      name: shown in tables and logs; unique within a recipe.
      train: pattern to learning rate (or `Update`); the first that matches a parameter wins,
        and what none matches is frozen.
      epochs: passes over the training data, at most.
      schedule: of all groups that name none of their own; constant by default.
      optimizer: likewise; the recipe's by default.
      until: ends the stage earlier.
      hand_on: the next stage starts from this stage's `best` epoch by validation (its start
        counts: a stage that never improves hands on what it got) or from its `last`.
      carry: `reset` starts every group's optimizer afresh, like a new torch optimizer; `keep`
        keeps that of groups which have trained before, like `add_param_group`.

    >>> from jaxft import Adam, schedules
    >>> stage = Stage(
    ...     "late",
    ...     train={"fc": 1e-3, "layer4": Update(1e-4, optimizer=Adam())},
    ...     epochs=10,
    ...     schedule=schedules.CosineAnnealingLR(),
    ...     until=EarlyStop("accuracy", patience=3),
    ... )
    """

    name: str
    train: Mapping[Pattern, float | Update]
    epochs: int
    schedule: ClosedForm | ReduceLROnPlateau | None = None
    optimizer: Rule | None = None
    until: EarlyStop | None = None
    hand_on: Literal["best", "last"] = "best"
    carry: Literal["reset", "keep"] = "reset"

    __pydantic_config__: ClassVar = {"extra": "forbid"}  # a saved recipe holds no unknown field

    def __post_init__(self) -> None:
        wrong, rules = [], {"its optimizer": self.optimizer}
        if not self.name:
            wrong.append("its name is empty")
        if not self.train:
            wrong.append("it trains nothing; name a pattern and a rate in `train`")
        for pattern, update in self.train.items():
            update, name = _as_update(update), show(pattern)
            lr, rule, decay = update.lr, update.optimizer, update.weight_decay
            if not (_is_number(lr) and lr > 0):
                wrong.append(f"the rate of {name!r} is {lr}; it must be a positive, finite number")
            if decay is not None and not (_is_number(decay) and decay >= 0):
                wrong.append(f"the weight_decay of {name!r} is {decay}; it must not be negative")
            rules[f"the optimizer of {name!r}"] = rule
        for place, rule in rules.items():
            if not isinstance(rule, Optimizer | optax.GradientTransformation | None):
                wrong.append(
                    f"{place} is {rule!r}; it must be one of jaxft's or an optax transform"
                )
        if self.epochs < 1:
            wrong.append(f"it has {self.epochs} epochs; it must have at least 1")
        if wrong:
            raise RecipeError(f"stage {self.name!r}: {'; '.join(wrong)}.")

    def resolve(self, pattern: Pattern, optimizer: Rule) -> "Resolved":
        """How what `pattern` selects trains, every default filled in.

        Raises RecipeError where a foreign optimizer is to take a weight_decay.
        """
        update = _as_update(self.train[pattern])
        rule = update.optimizer or self.optimizer or optimizer
        if update.weight_decay is not None:
            if isinstance(rule, optax.GradientTransformation):
                raise RecipeError(
                    f"stage {self.name!r}: {show(pattern)!r} has a weight_decay, but its optimizer "
                    "is an optax transform: put the decay into that."
                )
            rule = dataclasses.replace(rule, weight_decay=update.weight_decay)
        schedule = update.schedule or self.schedule or Constant()
        return Resolved(float(update.lr), schedule, rule)


def _as_update(given: float | Update) -> Update:
    return given if isinstance(given, Update) else Update(lr=given)


def _is_number(value: object) -> bool:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and math.isfinite(value)  # type: ignore[arg-type]


class Resolved(NamedTuple):
    """An `Update` with nothing left open."""

    lr: float
    schedule: ClosedForm | ReduceLROnPlateau
    optimizer: Rule


def check_stages(stages: Sequence[Stage]) -> None:
    """Raises RecipeError if there are no stages, or two of one name."""
    names = [stage.name for stage in stages]
    if not names:
        raise RecipeError("there must be at least one stage.")
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise RecipeError(f"stage names must be unique; {twice} occur more than once.")
