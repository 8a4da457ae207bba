"""Builds a network from a function that a recipe names: `model="my_module:build"`."""

from collections.abc import Callable
from typing import Any

from flax import linen, nnx

from jaxft import user_function
from jaxft.errors import ModelError, RecipeError
from jaxft.models import registry
from jaxft.models.model import Architecture, Model

_MEMBERS = [name for cls in (Architecture, Model) for name in vars(cls) if not name.startswith("_")]


def names_factory(model: str) -> bool:
    """Returns whether a recipe's `model` names a factory, not a network of the registry."""
    try:
        return ":" in model and not registry.is_registered(model)
    except RecipeError:  # `find` explains why the module cannot be imported
        return True


def find(name: str) -> Callable[[int], Any]:
    """Imports the factory `MODULE:FUNCTION`, see `jaxft.user_function.find`.

    Raises:
      ModelError: if the module or the function does not exist, or if the import fails.
    """
    try:
        return user_function.find(name)
    except RecipeError as error:
        raise ModelError(f"model is {error}") from error


def build(name: str, num_classes: int) -> Model:
    """Calls the factory `MODULE:FUNCTION` with the number of classes and returns its network.

    Raises:
      ModelError: if the call fails or does not return a network.
    """
    factory = find(name)
    try:
        model = factory(num_classes)
    except Exception as error:
        raise ModelError(f"{name}({num_classes}) fails: {user_function.describe(error)}") from error
    return checked(model, f"{name}({num_classes}) returned")


def checked(model: Any, origin: str) -> Model:
    """Returns `model` if it has all members of the `Model` protocol.

    Args:
      model: the object to check.
      origin: start of the error message, such as "model is".

    Raises:
      ModelError: if `model` is a class or lacks a member.
    """
    missing = [member for member in _MEMBERS if not hasattr(model, member)]
    is_class = isinstance(model, type)
    if not missing and not is_class:
        return model
    cls = model if is_class else type(model)
    wrappers = {linen.Module: "Linen", nnx.Module: "NNX"}
    wrapper = next((w for base, w in wrappers.items() if issubclass(cls, base)), "")
    if not (wrapper or is_class) and hasattr(model, "apply"):
        raise ModelError(
            f"{origin} a {cls.__name__}, which has no {', '.join(missing)}: see jaxft.models.Model."
        )
    raise ModelError(
        f"{origin} {'the class ' * is_class}{cls.__name__}, which is not a jaxft network: wrap a "
        f"Flax module, models.{wrapper or 'Linen'}(..., shape=(h, w, 3), head=...)."
    )
