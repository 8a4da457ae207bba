"""Builds a network from a function that a recipe names: `model="my_module:build"`."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from flax import linen, nnx

from jaxft.errors import ModelError
from jaxft.models.model import Architecture, Model

_MEMBERS = [name for cls in (Architecture, Model) for name in vars(cls) if not name.startswith("_")]


def names_factory(model: str) -> bool:
    """Returns whether a recipe's `model` names a factory, not a network of the registry."""
    return ":" in model


def search_in(folder: str | PathLike[str]) -> None:
    """Adds a folder, such as the one of the recipe file, to the folders searched for factories."""
    entry = str(Path(folder).absolute())
    if entry not in sys.path:
        sys.path.append(entry)  # at the end, so that it shadows no installed package


def find(name: str) -> Callable[[int], Any]:
    """Imports the factory `MODULE:FUNCTION`.

    Searches `sys.path`, the folders passed to `search_in`, and the current folder.

    Raises:
      ModelError: if the module or the function does not exist, or if the import fails.
    """
    module_name, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *function.split("."))):
        raise ModelError(
            f"model is {name!r}: a factory is written MODULE:FUNCTION, such as my_module:build."
        )
    search_in(os.getcwd())
    importlib.invalidate_caches()
    try:
        factory: Any = importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):
            raise ModelError(
                f"model is {name!r}, and importing it fails: {_describe(error)}"
            ) from error
        raise ModelError(
            f"model is {name!r}, and there is no module {missing!r}. It is searched for in the "
            "recipe's folder, in the current folder and on PYTHONPATH: run the command in its "
            "folder, or add its folder to PYTHONPATH."
        ) from error
    file = getattr(factory, "__file__", module_name)
    for part in function.split("."):
        if not hasattr(factory, part):
            raise ModelError(f"model is {name!r}, and {file} has no {function!r}.")
        factory = getattr(factory, part)
    if not callable(factory):
        raise ModelError(
            f"model is {name!r}, which is not a function but of type {type(factory).__name__}: it "
            "must return a network when called with the number of classes."
        )
    return factory


def build(name: str, num_classes: int) -> Model:
    """Calls the factory `MODULE:FUNCTION` with the number of classes and returns its network.

    Raises:
      ModelError: if the call fails or does not return a network.
    """
    factory = find(name)
    try:
        model = factory(num_classes)
    except Exception as error:
        raise ModelError(f"{name}({num_classes}) fails: {_describe(error)}") from error
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


def _describe(error: Exception) -> str:
    """Formats an error and the line that raised it."""
    (*_, last) = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
