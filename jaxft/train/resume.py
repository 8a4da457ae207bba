"""Going on with the run that a workdir holds: the newest checkpoint that can be read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from jaxft import recipe as recipes
from jaxft.data.fingerprint import changes
from jaxft.errors import CheckpointError
from jaxft.labels import Tree
from jaxft.optim.carry import carry_with_remarks
from jaxft.stages import Stage
from jaxft.train.metrics import EpochMetrics
from jaxft.train.opening import open_programs
from jaxft.train.position import Position, at_start, changing, restored
from jaxft.train.program import Program, Snapshot
from jaxft.train.progress import Progress
from jaxft.train.reopening import from_end, reopened
from jaxft.train.run import Run


def resume(run: Run, params: Tree, stats: Tree) -> tuple[Progress, Position | Snapshot] | None:
    """Where the run is: within a stage, or at its end with what it hands on; None at its start.

    `params` and `stats` need only be shapes. What of newer checkpoints cannot be read is said.

    Raises:
      CheckpointError: the images have changed; or see `Checkpoints.newest`.
    """

    data = run.data  # before the first step, while the files are those that were checked

    def check(fields: Mapping[str, Any]) -> None:
        if changed := changes(fields["data"], data):
            raise CheckpointError(
                f"the images have changed since {run.checkpoints.path(fields['step'])} was "
                "written:" + "".join(f"\n  {line}" for line in changed) + "\n"
                "Bring them back as they were, or train on them in another --workdir; it can "
                f"start from this run with --weights {run.checkpoints.path(fields['step'])}."
            )

    def like(fields: Mapping[str, Any]) -> dict[str, Tree]:
        check(fields)
        ended = bool(fields["ended"])
        # The end of a stage has the groups of the recipe that it was written by.
        programs = _written_by(run, fields, params, stats) if ended else run.programs
        return run.devices.abstract(
            structure(programs, fields["stage"], params, stats, ended=ended)
        )

    _reopen(run, check)
    found = run.checkpoints.newest(like)
    if found and "rows" not in found.progress:  # a checkpoint of an older version
        found.progress["rows"] = run.metrics.rows_until(found.step)
    run.metrics.begin(found.progress["rows"] if found else ())
    if found is None:
        return None
    for remark in found.remarks:
        run.console.say(remark)
    progress, epoch_metrics, _ = read(found.progress)
    program = run.programs[progress.stage]
    if (done := _reopened(run, found.progress)) is not None:
        run.console.say(
            f"Stage {program.plan.stage.name!r} had ended ({progress.ended}), and there is no "
            "earlier checkpoint of it to read: it goes on from what it handed on."
        )
        at = Snapshot(**found.arrays)
        position = at_start(
            program, from_end(program.plan.stage, progress, done, program.steps_per_epoch), at
        )
        position.epoch_metrics = epoch_metrics if position.progress.position else EpochMetrics()
        return position.progress, position
    run.console.say(_where(program, progress))
    if progress.ended:
        return progress, Snapshot(**found.arrays)
    return progress, restored(program, progress, epoch_metrics, found.arrays)


def _reopen(run: Run, check: Callable[[Mapping[str, Any]], None]) -> None:
    """Drops the newest checkpoint if it is the end of a stage that has become longer.

    The one before it in the stage then counts. Without one, the end stays.
    """
    *_, earlier, newest = (0, 0, *run.checkpoints.steps())
    if not earlier:
        return
    try:
        end, before = (run.checkpoints.progress(step) for step in (newest, earlier))
        run.checkpoints.verify(earlier)
    except CheckpointError:
        return  # `Checkpoints.newest` says so
    within = before["stage"] == end["stage"] and not before["ended"]
    if within and _reopened(run, end) is not None:
        check(end)
        run.console.say(
            f"Stage {run.recipe.stages[end['stage']].name!r} had ended ({end['ended']}). It has "
            f"become longer, and goes on from step {earlier}, the last one saved before."
        )
        run.checkpoints.drop(newest)


def _reopened(run: Run, fields: Mapping[str, Any]) -> int | None:
    """See `jaxft.train.reopening.reopened`."""
    if _same_stages(run, fields):
        return None
    progress, _, _ = read(fields)
    program = run.programs[progress.stage]
    was = _stages(fields)[progress.stage]
    return reopened(was, program.plan.stage, progress, program.steps_per_epoch)


def _same_stages(run: Run, fields: Mapping[str, Any]) -> bool:
    return bool(fields["recipe"]["stages"] == recipes.fields(run.recipe)["stages"])


def _stages(fields: Mapping[str, Any]) -> tuple[Stage, ...]:
    return recipes.from_fields(fields["recipe"], source="the checkpoint's recipe").stages


def _written_by(
    run: Run, fields: Mapping[str, Any], params: Tree, stats: Tree
) -> tuple[Program, ...]:
    """The programs of the recipe that a checkpoint was written by."""
    if _same_stages(run, fields):
        return run.programs
    recipe = dataclasses.replace(run.recipe, stages=_stages(fields))
    return open_programs(recipe, run.programs[0].model, run.splits, run.devices, (params, stats))


def structure(
    programs: tuple[Program, ...], stage: int, params: Tree, stats: Tree, *, ended: bool = False
) -> dict[str, Tree]:
    """The items of a checkpoint within a stage, or of its end, as shapes."""
    at = Snapshot(params, stats, state_shapes(programs, stage, params))
    items: dict[str, Tree] = at._asdict()
    if not ended:
        items["best"] = changing(programs[stage], at)._asdict()
        if (average := programs[stage].state(at)[0].average) is not None:
            items["average"] = list(average)
    return items


def state_shapes(programs: tuple[Program, ...], stage: int, params: Tree) -> optax.OptState:
    """The optimizer's state in a stage, with what is parked: as if all stages before had run."""

    def state(params: Tree) -> optax.OptState:
        at = programs[0].transform.init(params)
        for program in programs[1 : stage + 1]:
            at, _ = next_state(program, at, program.transform.init(params))
        return at

    return jax.eval_shape(state, params)


def next_state(
    program: Program, before: optax.OptState, fresh: optax.OptState
) -> tuple[optax.OptState, list[str]]:
    """The optimizer's state at a stage's start, given that at the end of the one before.

    Also what there is to say of it.
    """
    if program.plan.stage.carry == "reset":
        return fresh, []
    return carry_with_remarks(before, fresh, park=program.plan.park)


def read(fields: Mapping[str, Any]) -> tuple[Progress, EpochMetrics, Mapping[str, Any]]:
    """What `Run.save` was given of the progress, and what it added of the images."""
    rest = dict(fields)
    del rest["recipe"]
    rest.pop("rows", None)
    data = rest.pop("data")
    epoch_metrics = EpochMetrics.from_fields(rest.pop("epoch_metrics"))
    return Progress.from_fields(rest), epoch_metrics, data


def _where(program: Program, progress: Progress) -> str:
    if progress.ended:
        where = f"ended after epoch {progress.epoch}"
    elif progress.position:
        length = program.epoch_length(progress.epoch)
        where = f"step {progress.position} of {length} in epoch {progress.epoch + 1}"
    else:
        where = f"after epoch {progress.epoch} of {program.epochs}"
    return f"Going on from step {progress.step}: stage {program.plan.stage.name!r}, {where}."
