"""LambdaLR: the schedule of a function that the user writes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError
from jaxft.optim.argument_checks import TORCH_HINTS, RangeChecked
from jaxft.optim.schedule_base import Number, Schedule, Time, Unit
from jaxft.user_function import describe, find


@checked(
    "function",
    lr_lambda="name a function of a module, LambdaLR('my_module:factor')",
    **TORCH_HINTS,
)
@dataclass(frozen=True)
class LambdaLR(RangeChecked, Schedule):
    """Multiplies the learning rate by a function of the time, as torch's `LambdaLR`.

    The function is named, because a run saves its recipe as YAML. It receives an epoch, or a step
    with `by="step"`, as a Python int from 0, and returns a number. It is called once for each time
    of the stage before training, so that it may be any Python function.

    Attributes:
      function: `MODULE:FUNCTION`. The module is searched for in the recipe's folder, in the current
        folder and on PYTHONPATH.

    Example:
      >>> schedule = LambdaLR("math:exp2")
      >>> [float(schedule.lr_at(0.5, t, total=4)) for t in range(4)]
      [0.5, 1.0, 2.0, 4.0]
    """

    function: str
    by: Unit = "epoch"

    @classmethod
    def wrong_values(cls, values: Mapping[str, Any]) -> list[str]:
        """Returns an error message for each wrong value; imports and calls the function."""
        wrong = super().wrong_values(values)
        name = values.get("function", "math:exp")
        if not isinstance(name, str):
            return [
                *wrong,
                f"function is {name!r}; name a function of a module, 'my_module:factor', because "
                "a run saves its recipe as YAML",
            ]
        try:
            _factor(find(name), name, 0)
        except RecipeError as error:
            wrong.append(f"function is {error}".removesuffix("."))
        return wrong

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns lr times the function of t.

        Raises:
          RecipeError: the function raises an error or returns no finite number of at least 0.
        """
        factors = _factors(find(self.function), self.function, total)
        return lr * jnp.asarray(factors, jnp.result_type(float))[jnp.asarray(t)]


@lru_cache(maxsize=16)
def _factors(function: Callable[[int], Any], name: str, total: int) -> np.ndarray:
    """Returns the factors [total + 1] of a stage."""
    return np.array([_factor(function, name, t) for t in range(total + 1)], np.float64)


def _factor(function: Callable[[int], Any], name: str, t: int) -> float:
    try:
        factor = function(t)
    except Exception as error:
        raise RecipeError(f"{name!r}, and {name}({t}) fails: {describe(error)}.") from error
    value = float(factor) if isinstance(factor, Real) else math.nan
    if not 0 <= value < math.inf:
        raise RecipeError(
            f"{name!r}, and {name}({t}) returned {factor!r}; it must be a number of at least 0."
        )
    return value
