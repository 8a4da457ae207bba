"""A new run that starts from what a stage of another run has handed on."""

import dataclasses
import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxft.checkpoint import atomic, weights_only
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.errors import CheckpointError, RecipeError
from jaxft.labels import Tree, paths
from jaxft.models import Model
from jaxft.models.model import OPTIONS
from jaxft.recipe import Recipe
from jaxft.train.metrics import Score
from jaxft.train.program import Program, Snapshot
from jaxft.train.progress import Progress
from jaxft.train.resume import state_shapes
from jaxft.train.run import Run
from jaxft.train.workdir import saved
from jaxft.weights.description import check_options
from jaxft.weights.finite_check import check_finite
from jaxft.weights.head_classes import Order, class_order, reordered, reordering


@dataclass(frozen=True)
class Fork:
    """The end of a stage of another run.

    Attributes:
      workdir: that run's.
      stage: its name, in that run and in the new one.
      step: of its last checkpoint.
      recipe: of that run.
      fields: its progress, as its checkpoint holds it.
      order: that of the head's outputs in the new run, if it is another one; see `in_order`.
      remarks: a sentence on it.
    """

    workdir: Path
    stage: str
    step: int
    recipe: Recipe
    fields: dict[str, Any]
    order: Order | None = None
    remarks: tuple[str, ...] = ()


def find(workdir: str | os.PathLike[str], stage: str | None = None) -> Fork:
    """The end of the stage called `stage`, or else of the last one that has ended.

    Raises CheckpointError where there is none.
    """
    workdir = atomic.anywhere(workdir)
    recipe, folder = saved(workdir), workdir / "checkpoints"
    if recipe is None:
        raise CheckpointError(f"{workdir} holds no run with a checkpoint to fork from.")
    ended = {}
    with closing(Checkpoints(folder)) as checkpoints:
        for step in checkpoints.steps():
            fields = checkpoints.progress(step)
            if fields["ended"]:
                name = recipe.stages[fields["stage"]].name
                ended[name] = Fork(workdir, name, step, recipe, fields)
    if stage is None and ended:
        return [*ended.values()][-1]
    if stage not in ended:
        raise CheckpointError(
            f"{workdir} has no checkpoint of the end of stage {stage!r}; "
            + (f"stages that have ended: {', '.join(ended)}." if ended else "no stage has ended.")
        )
    return ended[stage]


def check(fork: Fork, recipe: Recipe) -> int:
    """The index of the fork's stage in the recipe that is to go on after it.

    Raises RecipeError if it has no such stage, or nothing after it.
    """
    names = [stage.name for stage in recipe.stages]
    if fork.stage not in names:
        raise RecipeError(
            f"a fork from stage {fork.stage!r} goes on with the stage after it, and the recipe has "
            f"no stage of that name; it has {', '.join(names)}."
        )
    if names[-1] == fork.stage:
        raise RecipeError(f"the recipe has no stage after {fork.stage!r}, from which it forks.")
    return names.index(fork.stage)


def in_order(fork: Fork, recipe: Recipe, model: Model, classes: Sequence[str]) -> Fork:
    """Returns the fork with the order that its head's outputs take among the images' classes.

    Raises WeightsError if they are of other classes, unless the recipe ignores that, or of a
    network with other options.
    """
    options = {name: getattr(fork.recipe, name) for name in OPTIONS}
    check_options(options, model, str(fork.workdir), keep=True)
    if recipe.head_classes == "ignore":
        return fork
    source, before = str(fork.workdir), fork.fields["data"]["classes"]
    way_out = (
        "A fork keeps the head. For a new one start a run of its own, with the other run as its\n"
        "weights and head='fresh'."
    )
    order = class_order(before, classes, source=source, way_out=way_out)
    if order is None:
        return fork
    return dataclasses.replace(fork, order=order, remarks=(reordering(before, classes, source),))


def check_arrays(
    fork: Fork, index: int, programs: tuple[Program, ...], params: Tree, stats: Tree
) -> None:
    """Raises CheckpointError if what stage `index` is to hand on does not fit the new recipe.

    `params` and `stats` need only be shapes.
    """
    with closing(Checkpoints(fork.workdir / "checkpoints")) as checkpoints:
        checkpoints.check(fork.step, _taken_over(index, programs, params, stats))


def _taken_over(
    index: int, programs: tuple[Program, ...], params: Tree, stats: Tree
) -> dict[str, Tree]:
    """As shapes, what the stage after `index` takes over: the optimizer's state, if it keeps it."""
    items = {"params": params, "stats": stats}
    if programs[index + 1].plan.stage.carry == "keep":
        items["opt_state"] = state_shapes(programs, index, params)
    return items


def take(run: Run, fork: Fork, params: Tree, stats: Tree) -> Snapshot:
    """Reads the arrays at the end of the fork's stage.

    The optimizer's state comes along only where the next stage is to keep it. `params` and `stats`
    need only be shapes; see `check_arrays`.
    """
    index = check(fork, run.recipe)
    with closing(Checkpoints(fork.workdir / "checkpoints")) as checkpoints:
        like = _taken_over(index, run.programs, params, stats)
        if "opt_state" in like:
            at = Snapshot(**checkpoints.restore(fork.step, run.devices.abstract(like)))
        else:
            trees = weights_only.read_weights(checkpoints.path(fork.step))
            fresh = jax.jit(run.programs[index].transform.init)(trees[0])
            at = Snapshot(*run.devices.put((*trees, fresh)))
    if fork.order:
        at = Snapshot(*reordered(run.programs[0].model, tuple(at), fork.order))
    arrays = run.devices.host((at.params, at.stats))
    check_finite(
        f"the end of stage {fork.stage!r} of {fork.workdir} (0 is params, 1 is stats)",
        paths(arrays),
        arrays,
    )
    return at


def begin(run: Run, fork: Fork, score: Score, at: Snapshot) -> Progress:
    """Returns the new run's progress at the end of the fork's stage, saved with its arrays.

    From here on the run is one like any other that has come this far. `score` is that of the
    arrays by this run's validation: images, preprocessing and seed may all differ from those that
    the other run's score came from.
    """
    progress = dataclasses.replace(
        Progress.at_start(check(fork, run.recipe), fork.step, score),
        ended=f"it is that of {fork.workdir}",
    )
    run.save(
        {**dataclasses.asdict(progress), "epoch_metrics": fork.fields["epoch_metrics"]},
        at._asdict(),
        keep=True,
    )
    return progress


def start(fork: Fork, model: Model) -> tuple[Tree, Tree]:
    """What that run started from, as far as it knows, or else what its stage has handed on."""
    kept = fork.workdir / "start"
    trees = weights_only.read_weights(
        kept if kept.exists() else fork.workdir / "checkpoints" / str(fork.step)
    )
    return reordered(model, trees, fork.order) if fork.order else trees
