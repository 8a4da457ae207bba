"""Optax: an optax transform by name, so that a recipe can hold it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import jax
import optax

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError
from jaxft.optim.argument_checks import RangeChecked
from jaxft.optim.complete_optimizer import WAY_OUT, is_complete
from jaxft.optim.optimizer_base import HINTS
from jaxft.user_function import describe, find

Argument = bool | int | float | str | None


@checked(**HINTS)
@dataclass(frozen=True)
class Optax(RangeChecked):
    """An optax transform by name, for recipes: a run saves its recipe as YAML.

    The transform leaves out the learning rate and its minus sign (`optax:scale_by_lion`, not
    `optax:lion`); those of the stage apply. Momenta of schedules have no effect on it.

    Attributes:
      function: `MODULE:FUNCTION`, a function that returns a transform: one of optax, or the user's
        own, such as one that returns an `optax.chain`. The module is searched for in the recipe's
        folder, in the current folder and on PYTHONPATH.
      arguments: keyword arguments of the function.

    Example:
      >>> rule = Optax("optax:scale_by_adan", {"b1": 0.95})
    """

    function: str
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    rule: Literal["optax"] = "optax"

    @classmethod
    def wrong_values(cls, values: Mapping[str, Any]) -> list[str]:
        """Returns an error message for each wrong value; calls the function.

        A complete optimizer, which includes a learning rate, is wrong.
        """
        name, arguments = values.get("function"), values.get("arguments", {})
        if not isinstance(name, str):
            return []
        wrong = [
            f"argument {key!r} is {value!r}; it must be a number, a string, True, False or None"
            for key, value in arguments.items()
            if not isinstance(value, Argument)
        ]
        if not wrong:
            try:
                _build(name, json.dumps(dict(arguments)))
            except RecipeError as error:
                wrong.append(f"function is {error}".removesuffix("."))
        return wrong

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the transform.

        Args:
          momentum: has no effect.
        """
        return _build(self.function, json.dumps(dict(self.arguments)))


@lru_cache(maxsize=64)  # `is_complete` remembers transforms by identity
def _build(name: str, arguments: str) -> optax.GradientTransformation:
    function = find(name)
    try:
        transform = function(**json.loads(arguments))
    except Exception as error:
        raise RecipeError(f"{name!r}, and calling it fails: {describe(error)}.") from error
    if not isinstance(transform, optax.GradientTransformation):
        raise RecipeError(
            f"{name!r}, which returned {transform!r}; it must return an optax transform."
        )
    if is_complete(transform):
        raise RecipeError(f"{name!r}, which returns an optimizer that {WAY_OUT}")
    return transform
