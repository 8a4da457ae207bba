"""The check of a recipe whose images may have several labels."""

from collections.abc import Iterator

import numpy as np

from jaxft.data import Source
from jaxft.data.split_expressions import parse
from jaxft.errors import RecipeError
from jaxft.recipe import Recipe
from jaxft.stages import Stage


def check_multi_label(recipe: Recipe, source: Source) -> None:
    """Checks that no field of the recipe needs one class per image.

    Args:
      recipe: the run's recipe.
      source: the training images, whose targets are `[n k]`.

    Raises:
      RecipeError: some fields do; the message lists all of them.
    """
    problems = [*_run_problems(recipe)]
    for stage in recipe.stages:
        problems += _stage_problems(recipe, stage)
    if not problems:
        return
    lines = [*dict.fromkeys(problems)]  # stages repeat the problems of the recipe's fields
    if (np.sum(source.targets, axis=1) == 1).all():
        lines.append("Each image has exactly one label: targets.argmax(1) makes it the class.")
    raise RecipeError(
        f"targets of shape {list(source.targets.shape)} may give an image several labels, and "
        "these fields need one class per image:" + "".join(f"\n  {line}" for line in lines)
    )


def _run_problems(recipe: Recipe) -> Iterator[str]:
    """Yields the problems of fields that no stage overrides."""
    if recipe.binary:
        yield "binary=True has one logit for two classes: leave it out"
    if recipe.shots is not None:
        yield f"shots={recipe.shots}: select by position, such as train_split='train[:100]'"
    for field in ("train_split", "val_split"):
        expression = getattr(recipe, field)
        if expression is not None and any(term.per_class for term in parse(expression)):
            yield f"{field}={expression!r}: select by position, such as 'train[:80%]'"


def _stage_problems(recipe: Recipe, stage: Stage) -> Iterator[str]:
    """Yields the problems of a stage, each after the stage's name unless it is the recipe's."""
    settings, prefix = recipe.settings(stage), f"stage {stage.name!r}: "

    def place(field: str) -> str:
        return "" if getattr(stage, field) is None else prefix

    if settings.loss == "cross_entropy":
        yield (
            f"{place('loss')}loss='cross_entropy': set loss='bce', Focal(...), or a function of "
            "yours"
        )
    if settings.balance != "none":
        yield f"{place('balance')}balance={settings.balance!r}: leave it out"
    if settings.label_smoothing:
        yield (f"{place('label_smoothing')}label_smoothing={settings.label_smoothing}: set it to 0")
    if stage.class_weights is not None:
        yield f"{prefix}class_weights: leave them out, or weight classes in a loss of yours"
    if stage.linear_probe:
        yield f"{prefix}LinearProbe(): train the head with a learning rate"
    if "top5" in stage.monitors:
        yield f"{prefix}monitor='top5': monitor 'accuracy', 'loss' or a metric of yours"
