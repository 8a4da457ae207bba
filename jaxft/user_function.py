"""Finds functions that a recipe names, `MODULE:FUNCTION`, because YAML cannot hold a function."""

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from jaxft.errors import RecipeError


def search_in(folder: str | PathLike[str]) -> None:
    """Adds a folder, such as the one of the recipe file, to the folders searched for functions."""
    entry = str(Path(folder).absolute())
    if entry not in sys.path:
        sys.path.append(entry)  # at the end, so that it shadows no installed package


def find(name: str) -> Callable[..., Any]:
    """Imports the function `MODULE:FUNCTION`.

    Searches `sys.path`, the folders passed to `search_in`, and the current folder.

    Raises:
      RecipeError: if the module or the function does not exist, or if the import fails. The message
        starts with the name in quotes.

    Example:
      >>> find("math:sqrt")(9.0)
      3.0
    """
    module_name, _, function = name.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *function.split("."))):
        raise RecipeError(f"{name!r}: it is written MODULE:FUNCTION, such as my_module:build.")
    value: Any = import_module(module_name, name)
    file = getattr(value, "__file__", module_name)
    for part in function.split("."):
        if not hasattr(value, part):
            raise RecipeError(f"{name!r}, and {file} has no {function!r}.")
        value = getattr(value, part)
    if not callable(value):
        raise RecipeError(f"{name!r}, which is not a function but of type {type(value).__name__}.")
    return value


def import_module(module_name: str, name: str) -> ModuleType:
    """Imports the module of `name`, which is written `MODULE:...`; searches as `find` does.

    Raises:
      RecipeError: if the module does not exist, or if the import fails.
    """
    search_in(os.getcwd())
    importlib.invalidate_caches()
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is None or not f"{module_name}.".startswith(f"{missing}."):
            raise RecipeError(f"{name!r}, and importing it fails: {describe(error)}") from error
        raise RecipeError(
            f"{name!r}, and there is no module {missing!r}. It is searched for in the "
            "recipe's folder, in the current folder and on PYTHONPATH: run the command in its "
            "folder, or add its folder to PYTHONPATH."
        ) from error


def describe(error: Exception) -> str:
    """Formats the first line of an error, and the line of code that raised it."""
    (*_, last) = traceback.extract_tb(error.__traceback__)
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message} ({last.filename}:{last.lineno})"
