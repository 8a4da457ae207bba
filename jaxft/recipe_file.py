"""Recipe files: reads recipes from Python and YAML, saves them as YAML, checks saved fields."""

import os
import runpy
import traceback
from collections.abc import Mapping
from functools import cache
from typing import Any

import pydantic
import yaml

from jaxft import user_function
from jaxft.checkpoint import atomic
from jaxft.dataclass_checks import CLASSES, unknown_field_message
from jaxft.errors import JaxftError, RecipeError
from jaxft.optim.optimizers import Optimizer
from jaxft.recipe import RESULT_NEUTRAL_FIELDS, Recipe
from jaxft.stages import Stage


def read(path: str | os.PathLike[str]) -> Recipe:
    """Reads a recipe from a Python file that defines `recipe`, or from a run's `recipe.yaml`.

    The file's folder becomes importable, so that `model="MODULE:FUNCTION"` finds a module there.

    Raises:
      RecipeError: the file does not exist, defines no recipe, or has wrong fields; the message
        lists all of them.
    """
    file = atomic.anywhere(path)
    if not file.is_file():
        raise RecipeError(f"{path}: no such recipe. It must be a .py or .yaml file.")
    if not atomic.in_bucket(file):
        user_function.search_in(file.parent)
    if file.suffix == ".py":
        recipe = _run_file(str(file)).get("recipe")
        if not isinstance(recipe, Recipe):
            raise RecipeError(f"{path} defines no recipe: it must assign recipe = Recipe(...).")
        return recipe
    try:
        fields = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is no YAML: {error}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path} holds no fields of a recipe, such as 'model: resnet50'.")
    return from_fields(fields, source=str(path))


def save(recipe: Recipe, path: str | os.PathLike[str]) -> None:
    """Writes a recipe as YAML; `read` returns an equal recipe."""
    atomic.write(path, yaml.safe_dump(fields(recipe), sort_keys=False))


def fields(recipe: Recipe) -> dict[str, Any]:
    """Returns the recipe as a dict of plain values, for YAML and JSON."""
    return dict(_adapter().dump_python(recipe, mode="json", warnings=False))


def from_fields(fields: Any, *, source: str) -> Recipe:
    """Builds a recipe from the dict that `fields` returns.

    Args:
      fields: the dict.
      source: where the dict comes from, for error messages.

    Raises:
      RecipeError: fields are unknown, missing or wrong; the message lists all of them.
    """
    try:
        return _adapter().validate_python(fields)
    except pydantic.ValidationError as error:
        messages = map(_error_message, error.errors())
        raise RecipeError(f"{source}: " + "\n  ".join(messages)) from None


def resolve(recipe: Recipe) -> Recipe:
    """Returns the recipe as it would be after saving and reading, with all types checked.

    Raises:
      RecipeError: a field is of a wrong type, or YAML cannot hold it: a pattern that is no string,
        an optax transform.
    """
    for stage in recipe.stages:
        rules = [stage.optimizer, *(getattr(u, "optimizer", None) for u in stage.train.values())]
        unsaveable = [pattern for pattern in stage.train if not isinstance(pattern, str)]
        unsaveable += [rule for rule in rules if not isinstance(rule, Optimizer | None)]
        if unsaveable:
            raise RecipeError(
                f"stage {stage.name!r}: {unsaveable[0]!r} cannot be saved with the run; a recipe's "
                "patterns are strings, its optimizers jaxft's. (jaxft.plan takes any.)"
            )
    return from_fields(fields(recipe), source="recipe")


def decisive(recipe: Recipe) -> dict[str, Any]:
    """Returns the fields that affect the result of a run, as plain values for JSON."""
    return {
        name: value for name, value in fields(recipe).items() if name not in RESULT_NEUTRAL_FIELDS
    }


def _run_file(path: str) -> dict[str, Any]:
    try:
        return runpy.run_path(path)
    except JaxftError:
        raise
    except SyntaxError as error:
        place = f"{error.filename}:{error.lineno}"
        raise RecipeError(f"{place}: {type(error).__name__}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == path), "?")
        raise RecipeError(f"{path}:{line}: {type(error).__name__}: {error}") from error


def _error_message(error: Mapping[str, Any]) -> str:
    """Returns one of pydantic's errors as text, with the field name that was probably meant."""
    place, message = error["loc"], error["msg"]
    if error["type"] == "unexpected_keyword_argument":
        # A place holds field names, indices, and the classes that pydantic tried for a union.
        classes = [CLASSES[key] for key in place[:-1] if key in CLASSES]
        in_stage = place[0] == "stages"
        cls = classes[-1] if classes else Stage if in_stage else Recipe
        message = f"Unexpected: {unknown_field_message(cls, str(place[-1]))}"
    return f"{'.'.join(map(str, place))}: {message}"


@cache
def _adapter() -> pydantic.TypeAdapter[Recipe]:
    return pydantic.TypeAdapter(Recipe)  # slow to build, and used at each checkpoint
