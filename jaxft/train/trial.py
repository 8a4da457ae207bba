"""A stage tried out: real steps from what its recipe starts with, of which nothing is kept."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace

import jax

from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Source, Splits
from jaxft.distributed import Devices, check_devices
from jaxft.errors import RecipeError
from jaxft.labels import Tree
from jaxft.models import Model
from jaxft.recipe import Recipe, resolve
from jaxft.stages import Stage
from jaxft.train import opening
from jaxft.train.stage_program import Compiled, Program
from jaxft.train.start import Start, drawn, given
from jaxft.train.train_step import TrainState


@dataclass(frozen=True)
class Trial:
    """A stage before its first step.

    Attributes:
      program: of the stage, alone in its recipe.
      source: the images to train on.
      params, stats: what it starts from.
    """

    program: Program
    source: Source
    params: Tree
    stats: Tree

    def compile(self) -> tuple[Compiled, TrainState, Tree]:
        """Its programs, its first state, which a step may have, and the frozen half."""
        params, stats, transform = self.params, self.stats, self.program.transform
        at = Snapshot(params, stats, jax.eval_shape(transform.init, params))
        compiled = self.program.compile(jax.eval_shape(lambda: at))
        state, frozen = self.program.state(at._replace(opt_state=compiled.fresh(params)))
        return compiled, compiled.copy(state), frozen

    def batches(self, count: int) -> Iterator[Batch]:
        """So many of them as the stage would see, on its devices."""
        program = self.program
        batches = program.batches(self.source, epochs=-(-count // program.steps_per_epoch))
        with closing(batches):
            for _, batch in zip(range(count), batches, strict=False):
                yield program.devices.batch(batch)


def named(recipe: Recipe, stage: str | None) -> Stage:
    """The recipe's stage of that name, the first by default; RecipeError if there is none."""
    stages = {each.name: each for each in recipe.stages}
    if stage is not None and stage not in stages:
        raise RecipeError(
            f"no stage is called {stage!r}; there are {', '.join(map(repr, stages))}."
        )
    return recipe.stages[0] if stage is None else stages[stage]


def trial(
    recipe: Recipe,
    stage: Stage,
    *,
    data: Source | Splits | None = None,
    model: Model | None = None,
    start: Start | None = None,
) -> Trial:
    """Opens a stage on what the recipe starts with, whatever other stages it has.

    `data`, `model` and `start` are as in `jaxft.finetune`, and so is what is raised.
    """
    recipe = resolve(replace(recipe, stages=(stage,), from_scratch=()))
    check_devices()
    opening.check_network(recipe, model)
    splits = opening.open_splits(recipe, data)
    classes = splits.train.classes
    model = opening.open_network(recipe, model, classes)
    source, recipe = opening.read_weights(recipe, model, classes)
    opening.check_image_size(recipe, model)
    devices = Devices(recipe.sharding)
    if start is None:
        at = drawn(recipe, model, source, opening.wanted_classes(recipe, classes))
    else:
        at = given(recipe, model, start)[0]
    seeing = replace(recipe, cache_mib=0, steps_per_execution=1)  # a step: one batch, of images
    (program,) = opening.open_programs(seeing, model, splits, devices, at)
    return Trial(program, splits.train, *devices.put(at))
