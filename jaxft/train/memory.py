"""What to do where a stage does not fit into the memory of the devices."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax

from jaxft.errors import RecipeError
from jaxft.train.stage_program import Program


@contextmanager
def fitting_memory(program: Program) -> Iterator[None]:
    """Turns XLA's out-of-memory error into a RecipeError that names the recipe's ways out."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise RecipeError("\n  ".join([_where(program, error), *_advice(program)])) from error


def _where(program: Program, error: Exception) -> str:
    line = str(error).partition("\n")[0]
    size = program.recipe.batch_size
    return (
        f"stage {program.plan.stage.name!r}: a batch of {size} images of "
        f"{program.recipe.preprocessing.image_size} pixels does not fit into the memory of "
        f"{jax.devices()[0].device_kind}: {line}\n"
        "What a run has saved stays. To need less memory:"
    )


def _advice(program: Program) -> list[str]:
    recipe, advice = program.recipe, []
    if not recipe.remat and len(program.model.blocks) > 1 and jax.default_backend() != "cpu":
        advice.append(
            "remat=True (--remat True) computes each block again in the backward pass: a forward "
            "pass more, the same results, and this run goes on with it."
        )
    parts = 2 * program.plan.stage.accumulate
    if recipe.batch_size % parts == 0:
        advice.append(
            f"accumulate={parts} in the stage works a batch through in {parts} parts: norm layers "
            "then see a part at a time. It is another recipe, for another --workdir."
        )
    advice.append(
        f"batch_size={max(1, recipe.batch_size // 2)} or smaller, with lower rates, is another "
        "recipe, too."
    )
    return advice
