"""Continues a run from its newest checkpoint, or reopens its last stage if that became longer.

Reopening: a run of a stage with `epochs=5` has ended and has two checkpoints, after epoch 4 and at
the end of the stage. The same run is started with `extend` and `epochs=8`. The end holds only the
arrays for a next stage, such as the arrays of the best epoch, and may lack the arrays after epoch
5. Its checkpoint is therefore deleted, and the stage continues after epoch 4, as if it had had 8
epochs from the start.
A stage without a readable checkpoint before its end continues from the arrays of the end instead.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxft import recipe_file as recipes
from jaxft.checkpoint.contents import Arrays, Header, Snapshot
from jaxft.data.fingerprint import changes
from jaxft.errors import CheckpointError
from jaxft.labels import Tree
from jaxft.stages import Stage
from jaxft.train.metrics import EpochMetrics
from jaxft.train.stage_program import StageProgram, open_programs
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

    def check_images(progress: Progress, header: Header) -> None:
        """Checks that the run's images are those of the checkpoint."""
        if changed := changes(header.data, data):
            path = trainer.checkpoints.path(progress.step)
            raise CheckpointError(
                f"the images have changed since {path} was written:"
                + "".join(f"\n  {line}" for line in changed)
                + "\nRestore the images, or train on the changed ones in another --workdir; that "
                f"run can start from this one with --weights {path}."
            )

    def expected_arrays(header_fields: Mapping[str, Any]) -> dict[str, Tree]:
        """Returns the shapes of a checkpoint's items; checks its images first."""
        header = Header.from_json(header_fields)
        progress = Progress.from_fields(header.progress)
        check_images(progress, header)
        has_ended = bool(progress.ended)
        # A longer recipe may divide parameters into other groups, but the optimizer state at the
        # end of a stage has the groups of the recipe that wrote it.
        programs = trainer.programs
        if has_ended:
            programs = _saved_programs(trainer, header, params, stats)
        shapes = item_shapes(programs, progress.stage, params, stats, ended=has_ended)
        return trainer.devices.abstract(shapes)

    _drop_end_of_longer_stage(trainer, check_images)
    restored = trainer.checkpoints.newest(expected_arrays)
    if restored is None:
        trainer.metrics.begin()
        return None
    header = Header.from_json(restored.header)
    trainer.metrics.begin(header.rows)
    for remark in restored.remarks:
        trainer.console.say(remark)
    progress = Progress.from_fields(header.progress)
    program = trainer.programs[progress.stage]
    steps_taken = _steps_if_reopened(trainer, progress, header)
    if steps_taken is not None:
        trainer.console.say(
            f"Stage {program.plan.stage.name!r} had ended ({progress.ended}). It has become "
            "longer and continues from the arrays at its end, as no earlier checkpoint of it can "
            "be read."
        )
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


def _drop_end_of_longer_stage(
    trainer: Trainer, check_images: Callable[[Progress, Header], None]
) -> None:
    """Deletes the newest checkpoint if it is the end of a stage that is to be reopened.

    The checkpoint before it becomes the newest. Does nothing if that one cannot be read or belongs
    to another stage.
    """
    # Steps count from 1; 0 stands for a checkpoint that does not exist.
    *_, earlier, newest = (0, 0, *trainer.checkpoints.steps())
    if not earlier:
        return
    try:
        headers = [Header.from_json(trainer.checkpoints.header(step)) for step in (newest, earlier)]
        trainer.checkpoints.verify(earlier)
    except CheckpointError:
        return  # `Checkpoints.newest` reports a damaged checkpoint
    end, before = (Progress.from_fields(header.progress) for header in headers)
    is_within_stage = before.stage == end.stage and not before.ended
    if is_within_stage and _steps_if_reopened(trainer, end, headers[0]) is not None:
        check_images(end, headers[0])  # before the checkpoint is deleted
        trainer.console.say(
            f"Stage {trainer.recipe.stages[end.stage].name!r} had ended ({end.ended}). It has "
            f"become longer, and continues from step {earlier}, the last one saved before."
        )
        trainer.checkpoints.drop(newest)


def _steps_if_reopened(trainer: Trainer, progress: Progress, header: Header) -> int | None:
    """Returns the steps that the checkpoint's stage has taken, if the stage is to be reopened.

    Returns None if the checkpoint is not the end of a stage, or if the stage stays ended.
    """
    if _has_same_stages(trainer, header):
        return None
    program = trainer.programs[progress.stage]
    before = _saved_stages(header)[progress.stage]
    return progress.steps_if_reopened(before, program.plan.stage, program.steps_per_epoch)


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
    return open_programs(
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
