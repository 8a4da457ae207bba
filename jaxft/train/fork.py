"""Starts a run, the fork, from the end of a stage of another run.

`jaxft.train.finetune` and `jaxft.train.train_stages` call these functions in this order:

1. `find_fork` finds the checkpoint of the end of the stage.
2. `stage_index` checks that the fork's recipe has this stage and one after it.
3. `with_head_order` checks that the network has the same options and, unless the recipe ignores
   them, the same classes; it determines the order of the head's outputs.
4. `check_fork` checks the shapes of all arrays that the fork will read. Until here nothing is
   written, and nothing large is read.
5. `start_weights` reads the weights that an anchor pulls to, if a stage has an anchor.
6. `read_fork` reads the arrays, puts the head's outputs in order and checks that they are finite.
7. `save_first_checkpoint` saves them. From here on the fork resumes like any other run, without the
   other run's folder.
"""

import dataclasses
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxft.checkpoint import atomic, weights_only
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.contents import WEIGHTS, Arrays, Header, Snapshot
from jaxft.errors import CheckpointError, RecipeError
from jaxft.labels import Tree, paths
from jaxft.models import Model
from jaxft.models.model import OPTIONS
from jaxft.recipe import Recipe
from jaxft.train.metrics import EpochMetrics, Score
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import Progress, opt_state_shapes
from jaxft.train.trainer import Trainer
from jaxft.train.workdir import saved
from jaxft.weights.description import check_options
from jaxft.weights.finite_check import check_finite
from jaxft.weights.head_classes import Order, class_order, reordered, reordering


@dataclass(frozen=True)
class Fork:
    """End of a stage of another run, from which a run starts.

    Attributes:
      workdir: folder of the other run.
      stage: name of the stage, in both recipes.
      step: step of the checkpoint at the end of the stage.
      recipe: recipe of the other run.
      header: header of the checkpoint.
      order: order of the head's outputs in this run; None if it is the same. Set by
        `with_head_order`.
      remarks: a sentence on that order, to print.
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
    """Finds the end of the stage called `stage`, or of the last stage that has ended.

    Raises:
      CheckpointError: the folder has no such checkpoint.
    """
    workdir = atomic.anywhere(workdir)
    recipe = saved(workdir)
    if recipe is None:
        raise CheckpointError(f"{workdir} holds no run with a checkpoint to fork from.")
    ends: dict[str, Fork] = {}  # by the name of the stage, in the order of the stages
    with closing(Checkpoints(workdir / "checkpoints")) as checkpoints:
        for step in checkpoints.steps():
            header = Header.from_json(checkpoints.header(step))
            progress = Progress.from_fields(header.progress)
            if progress.ended:
                name = recipe.stages[progress.stage].name
                ends[name] = Fork(workdir, name, step, recipe, header)
    if not ends:
        raise CheckpointError(f"{workdir} has no checkpoint to fork from: no stage has ended.")
    if stage is None:
        return [*ends.values()][-1]
    if stage not in ends:
        raise CheckpointError(
            f"{workdir} has no checkpoint of the end of stage {stage!r}; stages that have ended: "
            f"{', '.join(ends)}."
        )
    return ends[stage]


def stage_index(fork: Fork, recipe: Recipe) -> int:
    """Returns the index of the ended stage in the recipe of the new run.

    Raises:
      RecipeError: the recipe has no stage of that name, or no stage after it.
    """
    names = [stage.name for stage in recipe.stages]
    if fork.stage not in names:
        raise RecipeError(
            f"a fork from stage {fork.stage!r} continues with the stage after it, but the recipe "
            f"has no stage of that name; it has {', '.join(names)}."
        )
    if names[-1] == fork.stage:
        raise RecipeError(
            f"a fork from stage {fork.stage!r} continues with the stage after it, but the recipe "
            f"has no stage after {fork.stage!r}."
        )
    return names.index(fork.stage)


def with_head_order(fork: Fork, recipe: Recipe, model: Model, classes: Sequence[str]) -> Fork:
    """Returns the fork with the order of the head's outputs that matches the images' classes.

    Raises:
      WeightsError: the network has other options; or the head has other classes than the images,
        and the recipe does not ignore that.
    """
    options = {name: getattr(fork.recipe, name) for name in OPTIONS}
    check_options(options, model, str(fork.workdir), keep=True)
    if fork.recipe.lora and fork.recipe.lora_alpha != recipe.lora_alpha:
        raise RecipeError(
            f"the adapters of {fork.workdir} were trained with lora_alpha "
            f"{fork.recipe.lora_alpha}, and the recipe has {recipe.lora_alpha}: set it to the same."
        )
    if recipe.head_classes == "ignore":
        return fork
    source, head_classes = str(fork.workdir), fork.header.data["classes"]
    way_out = (
        "A fork keeps the head. To train a new head, start a run from the other run's weights "
        "instead,\nwith weights=... and head='fresh'."
    )
    order = class_order(head_classes, classes, source=source, way_out=way_out)
    if order is None:
        return fork
    remark = reordering(head_classes, classes, source)
    return dataclasses.replace(fork, order=order, remarks=(remark,))


def check_fork(
    fork: Fork, index: int, programs: Sequence[StageProgram], params: Tree, stats: Tree
) -> None:
    """Checks that the arrays at the end of the stage fit the new run, without reading them.

    Args:
      fork: end of the other run's stage.
      index: index of that stage in the new run.
      programs: stages of the new run.
      params, stats: parameters and statistics, or their shapes.

    Raises:
      CheckpointError: arrays do not fit; the message lists them.
    """
    with closing(Checkpoints(fork.workdir / "checkpoints")) as checkpoints:
        checkpoints.check(fork.step, _shapes_to_read(index, programs, params, stats))


def _shapes_to_read(
    index: int, programs: Sequence[StageProgram], params: Tree, stats: Tree
) -> dict[str, Tree]:
    """Returns the shapes of the items that the stage after `index` reads.

    The optimizer state is among them only if that stage keeps it: with `carry="reset"`, the other
    run may have had another optimizer.
    """
    keeps = programs[index + 1].plan.stage.carry == "keep"
    items = Arrays(Snapshot(params, stats, opt_state_shapes(programs, index, params))).to_items()
    return {name: tree for name, tree in items.items() if keeps or name in WEIGHTS}


def start_weights(fork: Fork, model: Model) -> tuple[Tree, Tree]:
    """Returns the weights that the other run started from; without them, those of the checkpoint.

    A run stores the weights it started from only if one of its stages has an anchor, or its first
    stage a `finish`.
    """
    start = fork.workdir / "start"
    trees = weights_only.read_weights(start if start.exists() else fork.checkpoint)
    return reordered(model, trees, fork.order) if fork.order else trees


def read_fork(trainer: Trainer, fork: Fork, params: Tree, stats: Tree) -> Snapshot:
    """Reads the arrays at the end of the stage and puts the head's outputs in order.

    Args:
      trainer: the new run's trainer.
      fork: end of the other run's stage, which `check_fork` has checked.
      params, stats: parameters and statistics, or their shapes.

    Raises:
      CheckpointError: a file is damaged.
      WeightsError: parameters or statistics are not finite.
    """
    index = stage_index(fork, trainer.recipe)
    shapes = _shapes_to_read(index, trainer.programs, params, stats)
    if "opt_state" in shapes:  # the next stage keeps it
        with closing(Checkpoints(fork.workdir / "checkpoints")) as checkpoints:
            items = checkpoints.restore(fork.step, trainer.devices.abstract(shapes))
        snapshot = Arrays.from_items(items).current
    else:
        trees = weights_only.read_weights(fork.checkpoint)
        # No stage uses this state, but the first checkpoint is the end of the ended stage, and
        # `resume` expects it to hold the optimizer state of that stage.
        unused = jax.jit(trainer.programs[index].transform().init)(trees[0])
        snapshot = Snapshot(*trainer.devices.put((*trees, unused)))
    if fork.order:
        snapshot = Snapshot(*reordered(trainer.programs[0].model, tuple(snapshot), fork.order))
    weights = trainer.devices.host((snapshot.params, snapshot.stats))
    check_finite(
        f"the end of stage {fork.stage!r} of {fork.workdir} (0 is params, 1 is stats)",
        paths(weights),
        weights,
    )
    return snapshot


def save_first_checkpoint(
    trainer: Trainer, fork: Fork, score: Score, snapshot: Snapshot
) -> Progress:
    """Saves the arrays of `read_fork` as the end of the stage in the new run.

    Args:
      trainer: the new run's trainer.
      fork: end of the other run's stage.
      score: validation score of the arrays in the new run, whose images, preprocessing and seed may
        differ from the other run's.
      snapshot: the arrays.

    Returns:
      The progress of the new run: the stage has ended, and the next one can start.
    """
    progress = dataclasses.replace(
        Progress.at_start(stage_index(fork, trainer.recipe), fork.step, score),
        # The reason makes this the end of the stage, so that `resume` continues with the next one.
        ended=f"in {fork.workdir}, from which this run forks",
    )
    metrics = EpochMetrics.from_fields(fork.header.epoch_metrics)
    trainer.save(progress, metrics, Arrays(snapshot).to_items(), keep=True)
    return progress
