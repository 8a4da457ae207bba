"""Going on with a run for longer: more epochs in its last stage, or further stages after it.

The run goes on as if its recipe had been the longer one from the start. For a stage that has ended
that means from its newest checkpoint before its end, since what a stage hands on need not be its
last epoch.
"""

from collections.abc import Sequence
from contextlib import closing
from os import PathLike

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.errors import RecipeError
from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.recipe import Recipe
from jaxft.recipe_differences import ABSENT, Difference, differences
from jaxft.train.program import Program
from jaxft.train.resume import state_shapes
from jaxft.train.start import Start


def refused(before: Recipe, now: Recipe) -> list[Difference]:
    """Returns the differences by which `now` is more than `before`, trained for longer."""
    last = before.stages[-1].name
    longer = [f"stages[{last}].{field}" for field in ("epochs", "steps", "minutes")]
    longer += [f"stages[{last}].until.{field}" for field in ("patience", "min_epochs")]
    names = [stage.name for stage in now.stages]
    appended = [f"stages[{name}]" for name in names[len(before.stages) :]]
    return [
        each
        for each in differences(before, now)
        if not (each.path in longer and _is_more(each))
        and not (each.path in appended and each.before is ABSENT)
    ]


def _is_more(each: Difference) -> bool:
    if each.before is None or each.now is None:  # a limit that is no more
        return each.now is None
    return bool(each.now > each.before)


def check(
    workdir: str | PathLike[str],
    before: Recipe,
    old: Sequence[Program],
    new: Sequence[Program],
    start: Start,
) -> None:
    """Raises RecipeError if the run could not go on as if it had been longer from the start.

    Args:
      workdir: the run's folder.
      before: its recipe so far.
      old: the programs of that recipe's stages.
      new: the programs of the longer recipe's stages.
      start: parameters and statistics, or their shapes.
    """
    index = len(old) - 1
    with closing(Checkpoints(epath.Path(workdir) / "checkpoints")) as checkpoints:
        step = checkpoints.latest_step()
        progress = checkpoints.progress(step) if step is not None else None
    if progress is None or progress["stage"] < index:
        return  # nothing of the last stage has been trained
    if old[index].plan.stage == new[index].plan.stage and progress["ended"]:
        return
    _check_rates(old[index], new[index])
    was, now = (
        jax.tree.leaves_with_path(state_shapes(tuple(programs), index, start[0]))
        for programs in (old, new)
    )
    if was != now:
        raise RecipeError(
            f"stage {before.stages[index].name!r} has begun, and the stages that are appended "
            "divide its groups of parameters. Let it end with its own recipe, then append them."
        )


def _check_rates(old: Program, new: Program) -> None:
    """Raises RecipeError if a schedule that spans the stage would have been another."""
    for group, update in new.plan.updates().items():
        schedule = update.schedule
        if isinstance(schedule, ReduceLROnPlateau):
            continue
        by_step = schedule.by == "step"
        totals = [program.steps if by_step else program.epochs for program in (old, new)]
        times = jnp.arange(totals[0])
        was, now = (
            [np.asarray(x) for x in (schedule.rate(update.lr, times, total),
                                     schedule.momentum(times, total)) if x is not None]
            for total in totals
        )  # fmt: skip
        if not all(map(np.array_equal, was, now)):
            raise RecipeError(
                f"stage {new.plan.stage.name!r}: the rates of {group!r} by "
                f"{type(schedule).__name__} depend on the stage's length, of which "
                f"{totals[0]} {schedule.by}s are planned and {totals[1]} wanted: the run would not "
                "be the longer one. Append a stage instead, with its own schedule."
            )
