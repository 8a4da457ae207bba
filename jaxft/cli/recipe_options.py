"""Recipe fields as command-line options, such as `--batch-size 64`."""

import os
from collections.abc import Sequence

import tyro

from jaxft.recipe import Recipe
from jaxft.recipe_file import read
from jaxft.stages import Stage

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
    return tyro.cli(
        Recipe, default=read(path), args=options, prog=f"{program} {path}", config=_CONFIG
    )


def print_recipe_options() -> None:
    """Prints the option of each recipe field, with the defaults of an example; exits."""
    tyro.cli(Recipe, default=_EXAMPLE, args=["--help"], prog="CONFIG", config=_CONFIG)
