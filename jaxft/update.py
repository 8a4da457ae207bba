"""Update: how a group of parameters trains in a stage."""

import dataclasses
import math
import numbers
import reprlib
from dataclasses import dataclass
from typing import NamedTuple

import optax

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError
from jaxft.optim.complete_optimizer import WAY_OUT, is_complete
from jaxft.optim.optax_rule import Optax
from jaxft.optim.optimizers import Optimizer, Rule
from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.optim.schedules import ClosedForm, Schedule


# The stage checks the values of an update, because it can name the pattern.
@checked("lr", "schedule", "optimizer", "weight_decay")
@dataclass(frozen=True)
class Update:
    """How a group trains, where its learning rate alone is not enough.

    Attributes:
      lr: base learning rate.
      schedule: changes the learning rate within the stage; by default the stage's schedule.
      optimizer: one of jaxft's, `Optax("optax.lion")` among them, or an optax transform that leaves
        out the learning rate and its minus sign (`optax.scale_by_lion()`, not `optax.lion(1e-4)`);
        by default the stage's optimizer.
      weight_decay: replaces the weight decay of the optimizer.
    """

    lr: float
    schedule: ClosedForm | ReduceLROnPlateau | None = None
    optimizer: Rule | None = None
    weight_decay: float | None = None

    def number_errors(self, name: str) -> list[str]:
        """Returns what is wrong with the learning rate and the weight decay of pattern `name`."""
        lr, decay, errors = self.lr, self.weight_decay, []
        if not (is_finite_number(lr) and lr > 0):
            errors.append(
                f"the learning rate of {name!r} is {reprlib.repr(lr)}; it must be a positive, "
                f"finite number{_lr_hint(lr)}"
            )
        if decay is not None and not (is_finite_number(decay) and decay >= 0):
            errors.append(f"the weight_decay of {name!r} is {decay!r}; it must not be negative")
        return errors

    def resolve(
        self, schedule: ClosedForm | ReduceLROnPlateau, optimizer: Rule, *, place: str, name: str
    ) -> "Resolved":
        """Returns the update with all defaults filled in.

        Args:
          schedule: used if the update sets none.
          optimizer: used if the update sets none.
          place: where the update stands, for errors, such as "stage 'late'".
          name: text of its pattern, for errors.

        Raises:
          RecipeError: the optimizer is an optax transform, and the update sets a weight_decay or
            the transform includes a learning rate.
        """
        rule = self.optimizer or optimizer
        if isinstance(rule, optax.GradientTransformation) and is_complete(rule):
            raise RecipeError(f"{place}: the optimizer of {name!r} {WAY_OUT}")
        if self.weight_decay is not None:
            if isinstance(rule, optax.GradientTransformation | Optax):
                raise RecipeError(
                    f"{place}: {name!r} has a weight_decay, but its optimizer is an optax "
                    "transform: put the decay into that."
                )
            rule = dataclasses.replace(rule, weight_decay=self.weight_decay)
        return Resolved(float(self.lr), self.schedule or schedule, rule)


class Resolved(NamedTuple):
    """An `Update` with all defaults filled in."""

    lr: float
    schedule: ClosedForm | ReduceLROnPlateau
    optimizer: Rule


def is_finite_number(value: object) -> bool:
    """Returns whether a value is a real, finite number and not a bool."""
    is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_real and math.isfinite(value)  # type: ignore[arg-type]


def _lr_hint(lr: object) -> str:
    """Returns where to write an object that is no learning rate."""
    if isinstance(lr, optax.GradientTransformation | Optimizer):
        return ". Write an optimizer as Update(1e-3, optimizer=...) or Stage(..., optimizer=...)"
    if callable(lr) or isinstance(lr, Schedule | ReduceLROnPlateau):
        return (
            ", the base of a schedule. Write the schedule as Stage(..., schedule=...) or "
            "Update(1e-3, schedule=...), from jaxft.schedules"
        )
    return ""
