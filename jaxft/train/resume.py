"""Going on with the run that a workdir holds: the newest checkpoint that can be read."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxft.carryover import carry_with_remarks
from jaxft.data.fingerprint import changes
from jaxft.errors import CheckpointError
from jaxft.labels import Tree
from jaxft.train.position import Position, changing, restored
from jaxft.train.program import Program, Snapshot
from jaxft.train.progress import Progress
from jaxft.train.run import Run
from jaxft.train.sums import Sums


def resume(run: Run, params: Tree, stats: Tree) -> tuple[Progress, Position | Snapshot] | None:
    """Where the run is: within a stage, or at its end with what it hands on; None at its start.

    `params` and `stats` need only be shapes. What of newer checkpoints cannot be read is said.

    Raises:
      CheckpointError: the images have changed; or see `Checkpoints.newest`.
    """

    data = run.data  # before the first step, while the files are those that were checked

    def like(fields: Mapping[str, Any]) -> dict[str, Tree]:
        progress, _, before = read(fields)
        if changed := changes(before, data):
            raise CheckpointError(
                f"the images have changed since {run.checkpoints.path(fields['step'])} was "
                "written:" + "".join(f"\n  {line}" for line in changed) + "\n"
                "Bring them back as they were, or train on them in another --workdir; it can "
                f"start from this run with --weights {run.checkpoints.path(fields['step'])}."
            )
        items = structure(run.programs, progress.stage, params, stats, ended=bool(progress.ended))
        return run.devices.abstract(items)

    found = run.checkpoints.newest(like)
    run.metrics.begin(found.progress["rows"] if found else ())
    if found is None:
        return None
    for remark in found.remarks:
        run.console.say(remark)
    progress, sums, _ = read(found.progress)
    program = run.programs[progress.stage]
    run.console.say(_where(program, progress))
    if progress.ended:
        return progress, Snapshot(**found.arrays)
    return progress, restored(program, progress, sums, found.arrays)


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


def read(fields: Mapping[str, Any]) -> tuple[Progress, Sums, Mapping[str, Any]]:
    """What `Run.save` was given of the progress, and what it added of the images."""
    rest = dict(fields)
    del rest["recipe"], rest["rows"]
    data, sums = rest.pop("data"), Sums.from_fields(rest.pop("sums"))
    return Progress.from_fields(rest), sums, data


def _where(program: Program, progress: Progress) -> str:
    if progress.ended:
        where = f"ended after epoch {progress.epoch}"
    elif progress.position:
        length = program.epoch_length(progress.epoch)
        where = f"step {progress.position} of {length} in epoch {progress.epoch + 1}"
    else:
        where = f"after epoch {progress.epoch} of {program.epochs}"
    return f"Going on from step {progress.step}: stage {program.plan.stage.name!r}, {where}."
