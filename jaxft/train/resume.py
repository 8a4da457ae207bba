"""Continues a run from its newest checkpoint, or a new one from the end of another run's stage."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxft import recipe_file as recipes
from jaxft.checkpoint import atomic, weights_only
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.contents import WEIGHTS, Arrays, Header, Snapshot
from jaxft.data.fingerprint import changes
from jaxft.errors import CheckpointError, RecipeError
from jaxft.labels import Tree, paths
from jaxft.models import Model
from jaxft.models.model import OPTIONS
from jaxft.recipe import Recipe
from jaxft.stages import Stage
from jaxft.train.metrics import EpochMetrics, Score
from jaxft.train.stage_program import StageProgram, open_programs
from jaxft.train.state import Progress, StageState, item_shapes, opt_state_shapes
from jaxft.train.trainer import Trainer
from jaxft.train.workdir import saved
from jaxft.weights.description import check_options
from jaxft.weights.finite_check import check_finite
from jaxft.weights.head_classes import Order, class_order, reordered, reordering


def resume(
    trainer: Trainer, params: Tree, stats: Tree
) -> tuple[Progress, StageState | Snapshot] | None:
    """Restores the newest readable checkpoint of the run.

    Prints a remark on each newer one, which cannot be read.

    Args:
      trainer: the run's trainer.
      params, stats: parameters and statistics, or their shapes.

    Returns:
      The progress with the state within a stage, or with the arrays at a stage's end; None if the
      run has no checkpoint.

    Raises:
      CheckpointError: the images have changed; or see `Checkpoints.newest`.
    """
    data = trainer.data  # computed here, before the files can change during training

    def check(progress: Progress, header: Header) -> None:
        if changed := changes(header.data, data):
            path = trainer.checkpoints.path(progress.step)
            raise CheckpointError(
                f"the images have changed since {path} was written:"
                + "".join(f"\n  {line}" for line in changed)
                + "\nBring them back as they were, or train on them in another --workdir; it can "
                f"start from this run with --weights {path}."
            )

    def like(fields: Mapping[str, Any]) -> dict[str, Tree]:
        header = Header.from_json(fields)
        progress = Progress.from_fields(header.progress)
        check(progress, header)
        ended = bool(progress.ended)
        # The end of a stage has the groups of the recipe that wrote it.
        programs = _programs_of(trainer, header, params, stats) if ended else trainer.programs
        shapes = item_shapes(programs, progress.stage, params, stats, ended=ended)
        return trainer.devices.abstract(shapes)

    _drop_end_of_longer_stage(trainer, check)
    found = trainer.checkpoints.newest(like)
    if found is None:
        trainer.metrics.begin()
        return None
    header = Header.from_json(found.header)
    trainer.metrics.begin(header.rows)
    for remark in found.remarks:
        trainer.console.say(remark)
    progress = Progress.from_fields(header.progress)
    program = trainer.programs[progress.stage]
    if (done := _steps_if_reopened(trainer, progress, header)) is not None:
        trainer.console.say(
            f"Stage {program.plan.stage.name!r} had ended ({progress.ended}), and there is no "
            "earlier checkpoint of it to read: it continues from the arrays that it handed on."
        )
        progress = progress.reopened(program.plan.stage, done, program.steps_per_epoch)
        current = StageState.at_start(program, progress, Arrays.from_items(found.arrays).current)
        if progress.position:
            current.epoch_metrics = EpochMetrics.from_fields(header.epoch_metrics)
        return progress, current
    trainer.console.say(_where(program, progress))
    if progress.ended:
        return progress, Arrays.from_items(found.arrays).current
    return progress, StageState.restored(program, header, found.arrays)


def _drop_end_of_longer_stage(trainer: Trainer, check: Callable[[Progress, Header], None]) -> None:
    """Drops the newest checkpoint if it is the end of a stage that has become longer.

    The one before it in the stage then counts. Without one, the end stays.
    """
    *_, earlier, newest = (0, 0, *trainer.checkpoints.steps())
    if not earlier:
        return
    try:
        headers = [Header.from_json(trainer.checkpoints.header(step)) for step in (newest, earlier)]
        trainer.checkpoints.verify(earlier)
    except CheckpointError:
        return  # `Checkpoints.newest` reports it
    end, before = (Progress.from_fields(header.progress) for header in headers)
    within = before.stage == end.stage and not before.ended
    if within and _steps_if_reopened(trainer, end, headers[0]) is not None:
        check(end, headers[0])
        trainer.console.say(
            f"Stage {trainer.recipe.stages[end.stage].name!r} had ended ({end.ended}). It has "
            f"become longer, and continues from step {earlier}, the last one saved before."
        )
        trainer.checkpoints.drop(newest)


def _steps_if_reopened(trainer: Trainer, progress: Progress, header: Header) -> int | None:
    """Returns the result of `Progress.steps_if_reopened` for the stage of a checkpoint."""
    if _has_same_stages(trainer, header):
        return None
    program = trainer.programs[progress.stage]
    before = _stages(header)[progress.stage]
    return progress.steps_if_reopened(before, program.plan.stage, program.steps_per_epoch)


def _has_same_stages(trainer: Trainer, header: Header) -> bool:
    return bool(header.recipe["stages"] == recipes.fields(trainer.recipe)["stages"])


def _stages(header: Header) -> tuple[Stage, ...]:
    return recipes.from_fields(header.recipe, source="the checkpoint's recipe").stages


def _programs_of(
    trainer: Trainer, header: Header, params: Tree, stats: Tree
) -> tuple[StageProgram, ...]:
    """Returns the programs of the recipe in a checkpoint's header."""
    if _has_same_stages(trainer, header):
        return trainer.programs
    recipe = dataclasses.replace(trainer.recipe, stages=_stages(header))
    return open_programs(
        recipe, trainer.programs[0].model, trainer.splits, trainer.devices, (params, stats)
    )


def _where(program: StageProgram, progress: Progress) -> str:
    if progress.ended:
        where = f"ended after epoch {progress.epoch}"
    elif progress.position:
        length = program.epoch_length(progress.epoch)
        where = f"step {progress.position} of {length} in epoch {progress.epoch + 1}"
    else:
        where = f"after epoch {progress.epoch} of {program.epochs}"
    return f"Going on from step {progress.step}: stage {program.plan.stage.name!r}, {where}."


@dataclass(frozen=True)
class Fork:
    """End of a stage of another run, from which a new run starts.

    Attributes:
      workdir: folder of the other run.
      stage: name of the stage, in that run and in the new one.
      step: step of its last checkpoint.
      recipe: recipe of that run.
      header: header of the checkpoint.
      order: order of the head's outputs in the new run, if it differs; see `in_order`.
      remarks: a sentence on that order.
    """

    workdir: Path
    stage: str
    step: int
    recipe: Recipe
    header: Header
    order: Order | None = None
    remarks: tuple[str, ...] = ()

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint."""
        return self.workdir / "checkpoints" / str(self.step)


def find_fork(workdir: str | os.PathLike[str], stage: str | None = None) -> Fork:
    """Returns the end of the stage called `stage`, or of the last stage that has ended.

    Raises:
      CheckpointError: there is none.
    """
    workdir = atomic.anywhere(workdir)
    recipe = saved(workdir)
    if recipe is None:
        raise CheckpointError(f"{workdir} holds no run with a checkpoint to fork from.")
    ended = {}
    with closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        for step in checkpoints.steps():
            header = Header.from_json(checkpoints.header(step))
            progress = Progress.from_fields(header.progress)
            if progress.ended:
                name = recipe.stages[progress.stage].name
                ended[name] = Fork(workdir, name, step, recipe, header)
    if stage is None and ended:
        return [*ended.values()][-1]
    if stage not in ended:
        raise CheckpointError(
            f"{workdir} has no checkpoint of the end of stage {stage!r}; "
            + (f"stages that have ended: {', '.join(ended)}." if ended else "no stage has ended.")
        )
    return ended[stage]


def stage_of_fork(fork: Fork, recipe: Recipe) -> int:
    """Returns the index of the fork's stage in the recipe of the new run.

    Raises:
      RecipeError: the recipe has no such stage, or none after it.
    """
    names = [stage.name for stage in recipe.stages]
    if fork.stage not in names:
        raise RecipeError(
            f"a fork from stage {fork.stage!r} continues with the stage after it, and the recipe "
            f"has no stage of that name; it has {', '.join(names)}."
        )
    if names[-1] == fork.stage:
        raise RecipeError(f"the recipe has no stage after {fork.stage!r}, from which it forks.")
    return names.index(fork.stage)


def in_order(fork: Fork, recipe: Recipe, model: Model, classes: Sequence[str]) -> Fork:
    """Returns the fork with the permutation of its head's outputs that matches the images' classes.

    Raises:
      WeightsError: the head is for other classes, and the recipe does not ignore that; or the
        network has other options.
    """
    options = {name: getattr(fork.recipe, name) for name in OPTIONS}
    check_options(options, model, str(fork.workdir), keep=True)
    if recipe.head_classes == "ignore":
        return fork
    source, before = str(fork.workdir), fork.header.data["classes"]
    way_out = (
        "A fork keeps the head. For a new one start a run of its own, with the other run as its\n"
        "weights and head='fresh'."
    )
    order = class_order(before, classes, source=source, way_out=way_out)
    if order is None:
        return fork
    return dataclasses.replace(fork, order=order, remarks=(reordering(before, classes, source),))


def check_fork(
    fork: Fork, index: int, programs: Sequence[StageProgram], params: Tree, stats: Tree
) -> None:
    """Checks that the arrays of the fork fit the new recipe.

    Args:
      fork: end of the other run's stage.
      index: index of that stage in the new run; see `stage_of_fork`.
      programs: stages of the new run.
      params, stats: parameters and statistics, or their shapes.

    Raises:
      CheckpointError: they do not fit.
    """
    with closing(Checkpoints(fork.workdir / "checkpoints")) as checkpoints:
        checkpoints.check(fork.step, _shapes_to_read(index, programs, params, stats))


def _shapes_to_read(
    index: int, programs: Sequence[StageProgram], params: Tree, stats: Tree
) -> dict[str, Tree]:
    """Returns the shapes of the items that the stage after `index` reads.

    The optimizer state is among them only if that stage keeps it.
    """
    keeps = programs[index + 1].plan.stage.carry == "keep"
    items = Arrays(Snapshot(params, stats, opt_state_shapes(programs, index, params))).to_items()
    return {name: tree for name, tree in items.items() if keeps or name in WEIGHTS}


def read_fork(trainer: Trainer, fork: Fork, params: Tree, stats: Tree) -> Snapshot:
    """Reads the arrays at the end of the fork's stage.

    Args:
      trainer: the new run's trainer.
      fork: end of the other run's stage; see `check_fork`.
      params, stats: parameters and statistics, or their shapes.
    """
    index = stage_of_fork(fork, trainer.recipe)
    like = _shapes_to_read(index, trainer.programs, params, stats)
    if "opt_state" in like:  # the next stage keeps it
        with closing(Checkpoints(fork.workdir / "checkpoints")) as checkpoints:
            items = checkpoints.restore(fork.step, trainer.devices.abstract(like))
        snapshot = Arrays.from_items(items).current
    else:
        trees = weights_only.read_weights(fork.checkpoint)
        fresh = jax.jit(trainer.programs[index].transform.init)(trees[0])
        snapshot = Snapshot(*trainer.devices.put((*trees, fresh)))
    if fork.order:
        snapshot = Snapshot(*reordered(trainer.programs[0].model, tuple(snapshot), fork.order))
    arrays = trainer.devices.host((snapshot.params, snapshot.stats))
    check_finite(
        f"the end of stage {fork.stage!r} of {fork.workdir} (0 is params, 1 is stats)",
        paths(arrays),
        arrays,
    )
    return snapshot


def begin_fork(trainer: Trainer, fork: Fork, score: Score, snapshot: Snapshot) -> Progress:
    """Saves the end of the fork's stage as the new run's first checkpoint; returns its progress.

    From here on the run is an ordinary one. `score` is the validation score of the arrays in this
    run, whose images, preprocessing and seed may differ from the other run's.
    """
    progress = dataclasses.replace(
        Progress.at_start(stage_of_fork(fork, trainer.recipe), fork.step, score),
        ended=f"in {fork.workdir}, from which this run forks",
    )
    metrics = EpochMetrics.from_fields(fork.header.epoch_metrics)
    trainer.save(progress, metrics, Arrays(snapshot).to_items(), keep=True)
    return progress


def start_of_fork(fork: Fork, model: Model) -> tuple[Tree, Tree]:
    """Returns the weights that the other run started from, or else the end of its stage."""
    start = fork.workdir / "start"
    trees = weights_only.read_weights(start if start.exists() else fork.checkpoint)
    return reordered(model, trees, fork.order) if fork.order else trees
