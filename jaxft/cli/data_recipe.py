"""The recipe of a command that takes a recipe file, or images and the name of a strategy."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from jaxft.cli.command_setup import count_argument
from jaxft.cli.recipe_options import override, read_recipe
from jaxft.default_stages import EPOCHS, LR, default_stages
from jaxft.errors import RecipeError
from jaxft.recipe import Recipe
from jaxft.stages import Stage
from jaxft.weights.torchvision import default_weights

MODEL, STRATEGY = "resnet50", "lp-ft"


def add_strategy_options(parser: argparse._ActionsContainer) -> None:
    """Adds the options for the stages of a strategy to a parser or one of its groups."""
    parser.add_argument(
        "--epochs",
        type=count_argument,
        metavar="N",
        help=f"epochs of all stages together; default: {EPOCHS}",
    )
    parser.add_argument(
        "--lr",
        type=float,
        metavar="X",
        help=f"learning rate of the body (norms, auto-rgn: times 10); default: {LR:g}",
    )


def data_spec(place: str) -> str:
    """Returns `folder:PATH` for a folder, `csv:FILE` for a CSV file, other data as it is."""
    if os.path.isdir(place):
        return f"folder:{place}"
    return f"csv:{place}" if place.endswith(".csv") and os.path.isfile(place) else place


def is_recipe_file(place: str) -> bool:
    """Returns whether the first argument of a command names a recipe file, not images."""
    return Path(place).suffix in (".py", ".yaml", ".yml")


def base_recipe(place: str, options: Sequence[str], program: str) -> Recipe:
    """Returns the recipe in a file, or a recipe for images whose single stage is to be replaced.

    For images the network is a ResNet-50, or the one that the option `--model` names; its weights
    are torchvision's, or those that `--weights` names.

    Args:
      place: a recipe file; or a folder of class folders, a CSV file, or data as in a recipe.
      options: fields of the recipe, such as `["--batch-size", "64"]`.
      program: the command as the user typed it, for messages.

    Raises:
      RecipeError: the recipe file or a field is wrong, or the network has no default weights.
      SystemExit: after `--help`, an unknown option or a value of another type.
    """
    if is_recipe_file(place):
        return read_recipe(place, options, program)
    data = data_spec(place)
    if ":" not in data and data != "digits":
        raise RecipeError(
            f"{place} is neither a recipe (a .py or .yaml file), nor a folder of images, nor data "
            f"such as tfds:NAME (looked from {Path.cwd()})."
        )
    default = Recipe(model=MODEL, data=data, stages=(Stage("all", {"*": LR}, 1),))
    recipe = override(
        default,
        options,
        f"{program} {place}",
        fixed=("stages", "optimizer"),  # a strategy sets them
    )
    if any(option.partition("=")[0] == "--weights" for option in options):
        return recipe
    weights = default_weights(recipe.model)
    if weights is None:
        recipe.network(num_classes=2)  # explains a name that does not exist
        raise RecipeError(
            f"{recipe.model} has no default weights: name some with --weights (hf:OWNER/REPO, a "
            "file, a run), or train from random ones with --weights None."
        )
    return dataclasses.replace(recipe, weights=weights)


def with_strategy(recipe: Recipe, name: str | None, lr: float | None, epochs: int | None) -> Recipe:
    """Returns the recipe with the stages of a strategy, with defaults for what is None.

    Raises:
      RecipeError: there is no such strategy, or the network is a single block.
    """
    network = recipe.network(num_classes=2)
    stages = default_stages(
        name or STRATEGY, network, lr=LR if lr is None else lr, epochs=epochs or EPOCHS
    )
    return dataclasses.replace(recipe, stages=stages)
