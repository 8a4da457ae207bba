"""Continues a run from its newest checkpoint, or reopens its last stage if that became longer.

Reopening: a run of a stage with `epochs=5` has ended and has two checkpoints, after epoch 4 and at
the end of the stage. The same run is started with `extend` and `epochs=8`; without `extend`,
`jaxft.train.workdir.check` has refused the longer recipe before. The end holds only the arrays for
a next stage, e.g. those of the best epoch, not those after epoch 5, from which training would
continue. Its checkpoint is therefore deleted, and the stage continues after epoch 4, as if it had
had 8 epochs from the start.
A stage without a readable checkpoint before its end continues from the arrays of the end instead.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxft import recipe_file as recipes
from jaxft.checkpoint.checkpoints import Restored
from jaxft.checkpoint.contents import Arrays, Header, Snapshot
from jaxft.data.fingerprint import changes
from jaxft.errors import CheckpointError
from jaxft.labels import Tree
from jaxft.stages import Stage
from jaxft.train.metrics import EpochMetrics
from jaxft.train.stage_program import StageProgram, build_programs
from jaxft.train.state import Progress, StageState, item_shapes
from jaxft.train.trainer import Trainer


def resume(
    trainer: Trainer, params: Tree, stats: Tree
) -> tuple[Progress, StageState | Snapshot] | None:
    """Restores the newest readable checkpoint of the run.

    Prints a remark for each newer checkpoint that cannot be read.

    Args:
      trainer: the run's trainer.
      params, stats: parameters and statistics, or their shapes.

    Returns:
      The progress, and either the state within a stage or the arrays at the end of a stage; None
      if the run has no checkpoint.

    Raises:
      CheckpointError: the images have changed, no checkpoint can be read, or its arrays do not fit.
    """
    data = trainer.data  # reads all files' names and sizes now: they may change during training

    def expected_arrays(header_fields: Mapping[str, Any]) -> dict[str, Tree]:
        """Returns the shapes of a checkpoint's items; checks its images first."""
        header, progress = _parsed(header_fields)
        if changed := changes(header.data, data):
            path = trainer.checkpoints.path(progress.step)
            # Ends the run: `Checkpoints.newest` skips damaged checkpoints alone.
            raise CheckpointError(
                f"the images have changed since {path} was written:"
                + "".join(f"\n  {line}" for line in changed)
                + "\nRestore the images, or train on the changed ones in another --workdir; that "
                f"run can start from this one with --weights {path}."
            )
        has_ended = bool(progress.ended)
        # A longer recipe may divide parameters into other groups, but the optimizer state at the
        # end of a stage has the groups of the recipe that wrote it.
        programs = trainer.programs
        if has_ended:
            programs = _saved_programs(trainer, header, params, stats)
        shapes = item_shapes(programs, progress.stage, params, stats, ended=has_ended)
        return trainer.devices.abstract(shapes)

    restored = _restore_newest(trainer, expected_arrays)
    if restored is None:
        trainer.metrics.begin()
        return None
    header, progress = _parsed(restored.header)
    steps_taken = _steps_taken_if_reopening(trainer, header, progress)
    if steps_taken is not None:
        earlier = _last_step_within_stage(trainer, progress)
        origin = "the arrays at its end, as no earlier checkpoint of it can be read"
        if earlier is not None:
            origin = f"step {earlier}, the last one saved before"
        trainer.console.say(
            f"Stage {trainer.recipe.stages[progress.stage].name!r} had ended ({progress.ended}). "
            f"It has become longer, and continues from {origin}."
        )
        if earlier is not None:
            trainer.checkpoints.drop(restored.step)
            del restored  # frees its arrays
            restored, steps_taken = _restore_newest(trainer, expected_arrays), None
            assert restored is not None  # the checkpoint of step `earlier`
            header, progress = _parsed(restored.header)
    trainer.metrics.begin(header.rows)
    program = trainer.programs[progress.stage]
    if steps_taken is not None:
        progress = progress.reopened(program.plan.stage, steps_taken, program.steps_per_epoch)
        end = Arrays.from_items(restored.arrays).current
        state = StageState.at_start(program, progress, end)
        if progress.position:  # it ended within an epoch, whose sums continue
            state.epoch_metrics = EpochMetrics.from_fields(header.epoch_metrics)
        return progress, state
    trainer.console.say(_position_text(program, progress))
    if progress.ended:
        return progress, Arrays.from_items(restored.arrays).current
    return progress, StageState.restored(program, header, restored.arrays)


def _parsed(header_fields: Mapping[str, Any]) -> tuple[Header, Progress]:
    header = Header.from_json(header_fields)
    return header, Progress.from_fields(header.progress)


def _restore_newest(
    trainer: Trainer, expected_arrays: Callable[[dict[str, Any]], Mapping[str, Tree]]
) -> Restored | None:
    """Restores the newest readable checkpoint and prints a remark for each newer one."""
    restored = trainer.checkpoints.newest(expected_arrays)
    for remark in restored.remarks if restored else ():
        trainer.console.say(remark)
    return restored


def _steps_taken_if_reopening(trainer: Trainer, header: Header, progress: Progress) -> int | None:
    """Returns the steps that the checkpoint's stage has taken, if the stage is to be reopened.

    Returns None if the checkpoint is not the end of a stage, or if the stage stays ended.
    """
    if _has_same_stages(trainer, header):
        return None
    program = trainer.programs[progress.stage]
    before = _saved_stages(header)[progress.stage]
    return progress.steps_taken_if_reopening(before, program.plan.stage, program.steps_per_epoch)


def _last_step_within_stage(trainer: Trainer, end: Progress) -> int | None:
    """Returns the step of the newest readable checkpoint of an ended stage before its end."""
    for step in reversed(trainer.checkpoints.steps()):
        if step >= end.step:
            continue
        try:
            _, progress = _parsed(trainer.checkpoints.header(step))
            if progress.stage != end.stage or progress.ended:  # or a former end, since reopened
                return None
            trainer.checkpoints.verify(step)
        except CheckpointError:
            continue  # `Checkpoints.newest` reports it, once the end is deleted
        return step
    return None


def _has_same_stages(trainer: Trainer, header: Header) -> bool:
    """Returns whether the checkpoint's recipe has the stages of the run's recipe."""
    return bool(header.recipe["stages"] == recipes.fields(trainer.recipe)["stages"])


def _saved_stages(header: Header) -> tuple[Stage, ...]:
    """Returns the stages of the recipe that wrote the checkpoint."""
    return recipes.from_fields(header.recipe, source="the checkpoint's recipe").stages


def _saved_programs(
    trainer: Trainer, header: Header, params: Tree, stats: Tree
) -> tuple[StageProgram, ...]:
    """Returns the programs of the recipe that wrote the checkpoint."""
    if _has_same_stages(trainer, header):
        return trainer.programs
    recipe = dataclasses.replace(trainer.recipe, stages=_saved_stages(header))
    return build_programs(
        recipe, trainer.programs[0].model, trainer.splits, trainer.devices, (params, stats)
    )


def _position_text(program: StageProgram, progress: Progress) -> str:
    """Returns a sentence on the point at which the run continues."""
    if progress.ended:
        position = f"ended after epoch {progress.epoch}"
    elif progress.position:
        length = program.epoch_length(progress.epoch)
        position = f"step {progress.position} of {length} in epoch {progress.epoch + 1}"
    else:
        position = f"after epoch {progress.epoch} of {program.epochs}"
    stage = program.plan.stage.name
    return f"The run continues from step {progress.step}: stage {stage!r}, {position}."
