"""Extends a run: more epochs in its last stage, or further stages after it.

The run ends as if its recipe had been the longer one from the start. A stage that has ended
therefore continues from its newest checkpoint before the end, because a stage need not end with
the weights of its last epoch.
"""

import dataclasses
from collections.abc import Sequence
from contextlib import closing
from os import PathLike

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.contents import Header
from jaxft.early_stopping import EarlyStop
from jaxft.errors import RecipeError
from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.recipe import Recipe
from jaxft.recipe_differences import ABSENT, Difference, differences
from jaxft.stages import Stage
from jaxft.train.opening import Start
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import Progress, opt_state_shapes


def refused(before: Recipe, now: Recipe) -> list[Difference]:
    """Returns the differences between the recipes that `--extend` does not allow."""
    last = before.stages[-1].name
    longer = [f"stages[{last}].{field}" for field in ("epochs", "steps", "max_minutes")]
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


def check_extension(
    workdir: str | PathLike[str],
    before: Recipe,
    old: Sequence[StageProgram],
    new: Sequence[StageProgram],
    start: Start,
) -> None:
    """Checks that the run can end as if it had been longer from the start.

    Args:
      workdir: the run's folder.
      before: its recipe so far.
      old: the programs of that recipe's stages.
      new: the programs of the longer recipe's stages.
      start: parameters and statistics, or their shapes.

    Raises:
      RecipeError: it cannot.
    """
    index = len(old) - 1
    with closing(Checkpoints(epath.Path(workdir) / "checkpoints")) as checkpoints:
        step = checkpoints.latest_step()
        if step is None:
            return
        progress = Progress.from_fields(Header.from_json(checkpoints.progress(step)).progress)
    if progress.stage < index:
        return  # nothing of the last stage has been trained
    if old[index].plan.stage == new[index].plan.stage and progress.ended:
        return
    _check_lrs(old[index], new[index])
    was, now = (
        jax.tree.leaves_with_path(opt_state_shapes(programs, index, start[0]))
        for programs in (old, new)
    )
    if was != now:
        raise RecipeError(
            f"stage {before.stages[index].name!r} has begun, and the stages that are appended "
            "divide its groups of parameters. Let it end with its own recipe, then append them."
        )


def _check_lrs(old: StageProgram, new: StageProgram) -> None:
    """Raises RecipeError if a schedule that spans the stage would have been another."""
    for group, update in new.plan.updates().items():
        schedule = update.schedule
        if isinstance(schedule, ReduceLROnPlateau):
            continue
        by_step = schedule.by == "step"
        totals = [program.steps if by_step else program.epochs for program in (old, new)]
        times = jnp.arange(totals[0])
        was, now = (
            [np.asarray(x) for x in (schedule.lr_at(update.lr, times, total),
                                     schedule.momentum(times, total)) if x is not None]
            for total in totals
        )  # fmt: skip
        if not all(map(np.array_equal, was, now)):
            raise RecipeError(
                f"stage {new.plan.stage.name!r}: the learning rates of {group!r} by "
                f"{type(schedule).__name__} depend on the stage's length, of which "
                f"{totals[0]} {schedule.by}s are planned and {totals[1]} wanted: the run would not "
                "be the longer one. Append a stage instead, with its own schedule."
            )


def reopened(before: Stage, now: Stage, progress: Progress, steps_per_epoch: int) -> int | None:
    """Returns the number of steps that an ended stage has taken, if its longer form continues it.

    A stage that ended by `EarlyStop` continues if its patience, or its least length, has grown. One
    that ended by `PlateauStop` does not. None: the stage stays ended.
    """
    done = min(before.length(steps_per_epoch), progress.epoch * steps_per_epoch)
    if before == now or now.solver or not progress.ended or done >= now.length(steps_per_epoch):
        return None
    if not progress.ended.endswith((" done", " over")):
        rule = now.until
        waits = isinstance(rule, EarlyStop) and (
            progress.waited < rule.patience or progress.epoch < rule.min_epochs
        )
        return done if waits else None
    return done


def from_end(stage: Stage, progress: Progress, done: int, steps_per_epoch: int) -> Progress:
    """Returns the progress of a stage that continues from its end, after `done` steps."""
    epoch, position = divmod(done, steps_per_epoch)
    score = progress.restored_score(stage)
    if stage.restore == "last":  # the arrays of its best epoch are not known
        progress = dataclasses.replace(progress, best=score, best_epoch=epoch)
    return dataclasses.replace(progress, epoch=epoch, position=position, score=score, ended="")
