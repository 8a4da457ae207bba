"""Recipe fields as command-line options, such as `--batch-size 64`."""

import dataclasses
import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from jaxft.recipe import Recipe
from jaxft.recipe_file import read
from jaxft.stages import Stage

_SEEN = object()  # marks a class that is on its way through tyro's own rule
_PLAIN_TYPES: dict[Any, dict[str, Any]] = {
    Recipe: {"loss": str},
    Stage: {"loss": str | None, "ema": float | None},
}
"""Types of the fields that hold either an object or a plain value, without the object's."""
_FIXED: Any = tyro.conf.Fixed
_HIDDEN: Any = tyro.conf.Suppress
_CONFIG = (tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff)
_EXAMPLE = Recipe(
    model="resnet50",
    data="folder:PATH",
    stages=(Stage("head", {"fc": 1e-3}, 5),),
)


def read_recipe(
    path: str | os.PathLike[str], options: Sequence[str] = (), program: str = "jaxft finetune"
) -> Recipe:
    """Reads a recipe file and overrides its fields by options.

    Args:
      path: a Python file that defines `recipe`, or a YAML file.
      options: for example `["--batch-size", "64"]`.
      program: the command as the user typed it, for messages.

    Raises:
      RecipeError: see `jaxft.recipe_file.read`.
      SystemExit: after `--help`, an unknown option or a value of another type.
    """
    return override(read(path), options, f"{program} {path}")


def override(
    recipe: Recipe, options: Sequence[str], program: str, *, fixed: Sequence[str] = ()
) -> Recipe:
    """Returns the recipe with fields overridden by options.

    Args:
      recipe: the recipe.
      options: for example `["--batch-size", "64"]`.
      program: the command as the user typed it, for messages.
      fixed: names of the recipe's fields that have no option.

    Raises:
      RecipeError: a field's value is wrong.
      SystemExit: after `--help`, an unknown option or a value of another type.
    """
    with _registry(fixed):
        return tyro.cli(Recipe, default=recipe, args=options, prog=program, config=_CONFIG)


def print_recipe_options() -> None:
    """Prints the option of each recipe field, with the defaults of an example; exits."""
    with _registry(()):
        tyro.cli(Recipe, default=_EXAMPLE, args=["--help"], prog="CONFIG", config=_CONFIG)


def _registry(fixed: Sequence[str]) -> ConstructorRegistry:
    """Returns the rules by which tyro makes options of a recipe."""
    registry = ConstructorRegistry()
    registry.struct_rule(partial(_plain_options, fixed))
    return registry


def _plain_options(fixed: Sequence[str], info: StructTypeInfo) -> StructConstructorSpec | None:
    """Returns options for the plain values of fields that may hold an object: `--loss bce`.

    With a class among a field's types, tyro would only take options of the default's own type.
    The recipe's `fixed` fields have none.
    """
    types = _PLAIN_TYPES.get(info.type)
    if types is None or _SEEN in info.markers:
        return None
    seen = dataclasses.replace(info, markers=(*info.markers, _SEEN))
    spec: Any = ConstructorRegistry.get_struct_spec(seen)  # by tyro's rule for dataclasses
    hidden = fixed if info.type is Recipe else ()

    def option(field: Any) -> Any:
        kind = field.type
        if field.name in hidden:
            kind = _HIDDEN[_FIXED[kind]]
        elif not dataclasses.is_dataclass(getattr(info.default, field.name, None)):
            kind = types.get(field.name, kind)
        return dataclasses.replace(field, type=kind, helptext=_one_line(field))

    return dataclasses.replace(spec, fields=tuple(map(option, spec.fields)))


def _one_line(field: Any) -> str | None:
    """Returns the help text of an option without line breaks, for tyro to wrap."""
    text = field.helptext() if callable(field.helptext) else field.helptext
    return text and " ".join(text.split())
