"""Functions of the user that compute one value per example: own losses and own metrics.

A recipe names one as `MODULE:FUNCTION`, because a run saves its recipe as YAML. The function
receives logits `[b k]` and targets `[b k]`, which are probabilities, and returns `[b]`. It is part
of the compiled programs, so it is written with `jax.numpy`. Padding may add rows, so the value of a
row must not depend on the other rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float

from jaxft.errors import RecipeError
from jaxft.user_function import describe, find


def function_name(name: str) -> str:
    """Returns the name of the function in `MODULE:FUNCTION`, by which a metric is reported."""
    return name.rpartition(":")[2].rpartition(".")[2]


def metric_names(metrics: Sequence[str], *, taken: Sequence[str]) -> list[str]:
    """Returns the names by which metrics are reported; imports their modules.

    Args:
      metrics: `MODULE:FUNCTION` each.
      taken: names of other metrics.

    Raises:
      RecipeError: a function does not exist, or two metrics have the same name.
    """
    names: list[str] = []
    for metric in metrics:
        try:
            find(metric)
        except RecipeError as error:
            raise RecipeError(f"a metric is {error}") from error
        name = function_name(metric)
        if name in (*taken, *names):
            raise RecipeError(
                f"a metric is {metric!r}, but there is another one called {name!r}. Rename the "
                "function."
            )
        names.append(name)
    return names


def call(name: str, logits: Float[jax.Array, "b k"], targets: Float[jax.Array, "b k"]) -> jax.Array:
    """Calls the function `MODULE:FUNCTION`, which `check` has checked; returns `[b]`."""
    values: jax.Array = find(name)(logits, targets)
    return values


def check(name: str, field: str, num_classes: int, *, has_gradient: bool = False) -> None:
    """Checks the output of a function without computing it.

    Args:
      name: `MODULE:FUNCTION`.
      field: "loss" or "a metric", for the message.
      num_classes: number of classes k.
      has_gradient: whether it must be differentiable, and its values floats.

    Raises:
      RecipeError: the function fails, or does not return one number per example.
    """
    function, count = find(name), num_classes + 1  # another number of rows than of classes
    array = jax.ShapeDtypeStruct((count, num_classes), jnp.float32)
    subject = f"{field} is {name!r}, "
    values = _shapes(function, array, f"{subject}and calling it fails")
    if getattr(values, "shape", None) != (count,):
        is_array = isinstance(values, jax.ShapeDtypeStruct)
        found = f"shape {list(values.shape)}" if is_array else f"a {type(values).__name__}"
        raise RecipeError(
            f"{subject}which returns {found} for logits and targets of shape {list(array.shape)}; "
            f"it must return one value per example, shape [{count}]."
        )
    if has_gradient:
        if not jnp.issubdtype(values.dtype, jnp.floating):
            raise RecipeError(f"{subject}which returns {values.dtype}; it must return floats.")
        gradient = jax.grad(lambda logits, targets: function(logits, targets).sum())
        _shapes(gradient, array, f"{subject}which has no gradient")


def _shapes(function: Callable[..., Any], array: jax.ShapeDtypeStruct, problem: str) -> Any:
    """Returns the shapes of `function(array, array)`; an error starts with the problem."""
    try:
        return jax.eval_shape(function, array, array)
    except Exception as error:
        raise RecipeError(f"{problem}: {describe(error)}.") from error
