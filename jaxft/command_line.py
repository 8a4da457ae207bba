"""A recipe's fields as options on the command line, for all scripts alike."""

import os
from collections.abc import Sequence

import tyro

from jaxft.recipe import Recipe, read


def read_with(path: str | os.PathLike[str], options: Sequence[str]) -> Recipe:
    """The recipe in a file, with `options` such as `--batch-size 64` before its own fields.

    Raises RecipeError as `jaxft.recipe.read`; what is no option, or no value of one, ends the
    program, as `--help` does.
    """
    return tyro.cli(
        Recipe,
        default=read(path),
        args=options,
        config=(tyro.conf.AvoidSubcommands, tyro.conf.FlagConversionOff),
    )
