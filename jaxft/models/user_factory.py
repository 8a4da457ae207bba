"""A network of the user's own that a recipe names by its factory: `my_module:build`."""

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
from jaxft.models.model import Model, Outline

_MEMBERS = [name for cls in (Outline, Model) for name in vars(cls) if not name.startswith("_")]


def names_factory(model: str) -> bool:
    """Returns whether a recipe's `model` is a factory, not a name of the registry."""
    return ":" in model


def search_in(folder: str | PathLike[str]) -> None:
    """Lets factories be imported from a folder: that of a recipe's file, for instance."""
    place = str(Path(folder).absolute())
    if place not in sys.path:
        sys.path.append(place)  # last, so that nothing installed is shadowed


def find(name: str) -> Callable[[int], Any]:
    """Imports the factory `MODULE:FUNCTION`.

    Besides `sys.path`, the current folder is searched, and those of `search_in`.

    Raises ModelError where there is no such module or function, or importing it fails.
    """
    place, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*place.split("."), *function.split("."))):
        raise ModelError(
            f"model is {name!r}: a factory is written MODULE:FUNCTION, such as my_module:build."
        )
    search_in(os.getcwd())
    importlib.invalidate_caches()
    try:
        factory: Any = importlib.import_module(place)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{place}.".startswith(f"{missing}."):
            raise ModelError(
                f"model is {name!r}, and importing it fails: {_told(error)}"
            ) from error
        raise ModelError(
            f"model is {name!r}, and there is no module {missing!r}. It is searched for beside the "
            "recipe, in the current folder and on PYTHONPATH: run the command where it lies, or "
            "name its folder in PYTHONPATH."
        ) from error
    file = getattr(factory, "__file__", place)
    for part in function.split("."):
        if not hasattr(factory, part):
            raise ModelError(f"model is {name!r}, and {file} has no {function!r}.")
        factory = getattr(factory, part)
    if not callable(factory):
        raise ModelError(
            f"model is {name!r}, and that is no function but a {type(factory).__name__}: it must "
            "return a network when called with the number of classes."
        )
    return factory


def build(name: str, num_classes: int) -> Model:
    """Calls the factory `MODULE:FUNCTION` with the number of classes; returns its network.

    Raises ModelError where that fails, or the factory returns no network.
    """
    factory = find(name)
    try:
        model = factory(num_classes)
    except Exception as error:
        raise ModelError(f"{name}({num_classes}) fails: {_told(error)}") from error
    return checked(model, f"{name}({num_classes}) returned")


def checked(model: Any, origin: str) -> Model:
    """Returns the network; raises ModelError where it is none.

    origin: begins the message: who gave it.
    """
    lacking = [member for member in _MEMBERS if not hasattr(model, member)]
    if not lacking and not isinstance(model, type):
        return model
    kind = model.__name__ if isinstance(model, type) else type(model).__name__
    wraps = {linen.Module: "Linen", nnx.Module: "NNX"}
    of_flax = model if isinstance(model, type) else type(model)
    wrapper = next((w for base, w in wraps.items() if issubclass(of_flax, base)), "")
    if not (wrapper or isinstance(model, type)) and hasattr(model, "apply"):
        raise ModelError(
            f"{origin} a {kind}, which has no {', '.join(lacking)}: see jaxft.models.Model."
        )
    raise ModelError(
        f"{origin} {'the class ' * isinstance(model, type)}{kind}, which is no network yet: wrap a "
        f"Flax module, models.{wrapper or 'Linen'}(..., shape=(h, w, 3), head=...)."
    )


def _told(error: Exception) -> str:
    """The error and the line that raised it."""
    (*_, last) = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {error} ({last.filename}:{last.lineno})"
