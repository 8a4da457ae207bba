"""Optax: an optax optimizer or transform by name, so that a recipe can hold it."""

import difflib
import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import jax
import optax

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError
from jaxft.optim.argument_checks import RangeChecked
from jaxft.optim.complete_optimizer import WAY_OUT, is_complete, unfit_reason
from jaxft.optim.optimizer_base import HINTS
from jaxft.user_function import describe, find

Argument = bool | int | float | str | None
_OPTAX = ("optax.", "optax:")  # starts of the names of optax's own functions


@checked(**HINTS)
@dataclass(frozen=True)
class Optax(RangeChecked):
    """An optax optimizer by name, for recipes: a run saves its recipe as YAML.

    A function with an argument `learning_rate` returns a complete optimizer; each step sets its
    learning rate to the group's. Any other function returns a transform that leaves out the
    learning rate and its minus sign (`optax.scale_by_lion`); the stage's apply. Momenta of
    schedules have no effect on either.

    Attributes:
      function: dotted name or `MODULE:FUNCTION` of a function: one of optax, or the user's own,
        such as one that returns an `optax.chain`. The module is searched for in the recipe's
        folder, in the current folder and on PYTHONPATH.
      arguments: keyword arguments of the function, without `learning_rate`.

    Example:
      >>> rule = Optax("optax.contrib.muon", {"weight_decay": 0.1})
    """

    function: str
    arguments: Mapping[str, Argument] = field(default_factory=dict)
    rule: Literal["optax"] = "optax"

    @classmethod
    def wrong_values(cls, values: Mapping[str, Any]) -> list[str]:
        """Returns an error message for each wrong value; calls the function."""
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
                wrong = _wrong_names(name, arguments)
                if not wrong:
                    _build(name, json.dumps(dict(arguments)))
            except RecipeError as error:
                wrong = [f"function is {error}".removesuffix(".")]
        return wrong

    @property
    def takes_lr(self) -> bool:
        """Whether the function takes `learning_rate`, and so returns a complete optimizer."""
        return "learning_rate" in _parameters(_find(self.function))

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the transform; with `takes_lr`, at some learning rate.

        Args:
          momentum: has no effect.
        """
        return _build(self.function, json.dumps(dict(self.arguments)))

    def at_lr(self, lr: jax.Array) -> optax.GradientTransformation:
        """Returns the complete optimizer at a learning rate [], which may be traced.

        Its state has the same structure at each learning rate, as in `optax.inject_hyperparams`.
        """
        transform: optax.GradientTransformation = _find(self.function)(
            learning_rate=lr, **self.arguments
        )
        return transform


def _wrong_names(name: str, arguments: Mapping[str, Argument]) -> list[str]:
    """Returns an error message for each argument that the function does not take from a recipe."""
    parameters = _parameters(_find(name))
    takes_any = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    accepted = ", ".join(key for key in parameters if not _is_lr(key))
    return [
        f"argument {key!r} belongs to the stage, train={{'fc': 1e-3}}"
        if _is_lr(key)
        else f"function {name!r} has no argument {key!r}; it accepts {accepted}"
        for key in arguments
        if _is_lr(key) or not (takes_any or key in parameters)
    ]


def _is_lr(argument: str) -> bool:
    return argument.endswith("learning_rate")  # such as muon's `adam_learning_rate`


def _build(name: str, arguments: str) -> optax.GradientTransformation:
    return _call(_find(name), name, arguments)


@lru_cache(maxsize=64)  # `is_complete` remembers transforms by identity
def _call(function: Callable[..., Any], name: str, arguments: str) -> optax.GradientTransformation:
    takes_lr = "learning_rate" in _parameters(function)
    lr = {"learning_rate": 0.1} if takes_lr else {}
    try:
        transform = function(**lr, **json.loads(arguments))
    except Exception as error:
        raise RecipeError(f"{name!r}, and calling it fails: {describe(error)}.") from error
    if not isinstance(transform, optax.GradientTransformation):
        raise RecipeError(
            f"{name!r}, which returned {transform!r}; it must return an optax transform."
        )
    # A function of the user may need the parameters of a network.
    if name.startswith(_OPTAX) and (reason := unfit_reason(transform)):
        raise RecipeError(f"{name!r}, {reason}.")
    if is_complete(transform) and not takes_lr:
        raise RecipeError(
            f"{name!r}, which has no argument learning_rate and returns an optimizer that {WAY_OUT}"
        )
    if is_complete(transform) is False and takes_lr:
        raise RecipeError(
            f"{name!r}, which takes learning_rate and returns a transform that climbs. A function "
            "with this argument must return a complete optimizer, with the minus sign."
        )
    return transform


def _find(name: str) -> Callable[..., Any]:
    """Imports the function; for a name in optax, the error lists near misses."""
    module, _, function = name.rpartition(":" if ":" in name else ".")
    try:
        return find(f"{module}:{function}" if module else name)
    except RecipeError as error:
        names = {
            key: f"{package.__name__}.{key}"
            for package in (optax.contrib, optax)
            for key, value in vars(package).items()
            if callable(value) and not key.startswith("_")
        }
        similar = difflib.get_close_matches(function, names, cutoff=0.7)
        if not name.startswith(_OPTAX) or not similar:
            raise
        candidates = ", ".join(names[key] for key in similar)
        message = f"{name!r}, which optax does not have; similar names are {candidates}."
        raise RecipeError(message) from error


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a function by name; none for some built-in functions."""
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:
        return {}
