"""Learning rate finder: the loss while the learning rate rises, and its suggestions.

Smith 2015 (arXiv:1506.01186), in the form of fastai's `lr_find`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import jax
import numpy as np

from jaxft import open_recipe
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Source, Splits
from jaxft.data.device_augment import augment_batch
from jaxft.devices import Devices
from jaxft.distributed import check_devices
from jaxft.errors import RecipeError
from jaxft.labels import Tree
from jaxft.models import Model
from jaxft.open_recipe import Start, draw_start, fit_start
from jaxft.optim.schedules import ExponentialLR
from jaxft.recipe import Recipe
from jaxft.recipe_file import resolve
from jaxft.stages import Stage
from jaxft.train.auto_rgn import BATCHES, restart_with_auto_rgn
from jaxft.train.compiled_stage import CompiledStage, compile_stage
from jaxft.train.stage_program import StageProgram, build_programs
from jaxft.train.train_step import TrainState

BETA = 0.98
DIVERGED = 4.0  # times the best smoothed loss
UNSETTLED = 5  # last points, which no rule looks at; nor at the first tenth of the steps


@dataclass(frozen=True)
class Trial:
    """A stage before its first step, to take steps that nothing saves.

    Attributes:
      program: the stage, alone in its recipe.
      source: the training images.
      params, stats: arrays that it starts from.
    """

    program: StageProgram
    source: Source
    params: Tree
    stats: Tree

    def compile(self) -> tuple[CompiledStage, TrainState, Tree]:
        """Returns its programs, its first state, which a step may donate, and the frozen half."""
        params, stats, transform = self.params, self.stats, self.program.transform()
        start = Snapshot(params, stats, jax.eval_shape(transform.init, params))
        compiled = compile_stage(self.program, jax.eval_shape(lambda: start))
        state, frozen = self.program.state(start._replace(opt_state=compiled.fresh(params)))
        return compiled, compiled.copy(state), frozen

    def batches(self, count: int) -> Iterator[Batch]:
        """Yields the first batches of the stage, on its devices."""
        program = self.program
        batches = program.batches(self.source, stop_epoch=-(-count // program.steps_per_epoch))
        with closing(batches):
            for _, batch in zip(range(count), batches, strict=False):
                yield augment_batch(program.devices.batch(batch), program.settings.augment)


def named(recipe: Recipe, stage: str | None) -> Stage:
    """Returns the recipe's stage of that name, the first by default.

    Raises:
      RecipeError: there is none.
    """
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
    """Opens a stage on the recipe's start, whatever other stages the recipe has.

    Takes the arguments and raises the errors of `jaxft.finetune`.
    """
    recipe = resolve(replace(recipe, stages=(stage,)))
    check_devices()
    open_recipe.check_network(recipe, model)
    splits = open_recipe.open_splits(recipe, data)
    classes = splits.train.classes
    model = open_recipe.open_network(recipe, model, classes)
    source, recipe = open_recipe.read_weights(recipe, model, classes)
    open_recipe.check_image_size(recipe, model)
    devices = Devices(recipe.sharding)
    if start is None:
        at = draw_start(recipe, model, source, open_recipe.wanted_classes(recipe, classes))
    else:
        at = fit_start(recipe, model, start)[0]
    seeing = replace(recipe, cache_mib=0, steps_per_execution=1)  # a step: one batch, of images
    (program,) = build_programs(seeing, model, splits, devices, at)
    return Trial(program, splits.train, *devices.put(at))


@dataclass(frozen=True)
class Curve:
    """Losses of a range test.

    Attributes:
      steps: planned number of steps; the test ends earlier once the loss has diverged.
      lrs: learning rate of each step; with several groups, the highest one.
      losses: loss of each step's batch, before the step; only the last one may be not finite.
    """

    steps: int
    lrs: Sequence[float]
    losses: Sequence[float]

    @property
    def smoothed(self) -> np.ndarray:
        """The losses' exponential average, corrected for the bias of its start."""
        return smooth(self.losses)

    def suggestions(self) -> dict[str, float]:
        """Returns a learning rate by each of the `RULES`.

        Raises:
          RecipeError: the loss diverged too early.
        """
        losses = self.smoothed
        lost = np.flatnonzero(~np.isfinite(losses))
        seen = slice(self.steps // 10, lost[0] if len(lost) else max(len(losses) - UNSETTLED, 0))
        lrs, losses = np.asarray(self.lrs)[seen], losses[seen]
        if len(lrs) < 2:
            raise RecipeError(
                f"the loss diverged in {len(self.losses)} of {self.steps} steps, at lr "
                f"{self.lrs[-1]:.1e}; there is no curve. Begin lower."
            )
        return {name: rule(lrs, losses) for name, rule in RULES.items()}


def smooth(losses: Sequence[float], beta: float = BETA) -> np.ndarray:
    """Returns v / (1 - beta^k) after each loss k, where v = beta·v + (1 - beta)·loss from 0."""
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses, 1):
        average = beta * average + (1 - beta) * loss
        smoothed.append(average / (1 - beta**count))
    return np.array(smoothed)


def valley(lrs: np.ndarray, losses: np.ndarray) -> float:
    """Returns the learning rate half way down the longest fall: fastai's default.

    The fall ends at the first point where a longest decreasing subsequence can end, and is taken to
    be as many consecutive points as that subsequence has.
    """
    longest = np.ones(len(losses), int)
    for i in range(1, len(losses)):
        longest[i] += max(longest[:i][losses[:i] > losses[i]], default=0)
    end = int(longest.argmax())
    length = int(longest[end]) if longest[end] > 1 else 0
    third = length / 3
    return float(lrs[max(end - length + int(third) + int(third / 2), 0)])


def steepest(lrs: np.ndarray, losses: np.ndarray) -> float:
    """Returns the learning rate where the loss falls fastest over its logarithm."""
    return float(lrs[np.argmin(np.diff(losses) / np.diff(np.log(lrs)))])


def tenth_of_minimum(lrs: np.ndarray, losses: np.ndarray) -> float:
    """Returns a tenth of the learning rate with the lowest loss."""
    return float(lrs[np.argmin(losses)]) / 10


RULES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "valley": valley,
    "steepest": steepest,
    "minimum / 10": tenth_of_minimum,
}


def highest(stage: Stage) -> float:
    """Returns the largest base learning rate of a stage."""
    return max(update.lr for update in stage.updates.values())


def ramp(stage: Stage, *, low: float, high: float, steps: int) -> Stage:
    """Returns the stage of a range test: its highest learning rate rises from `low` to `high`.

    The learning rates of the other groups keep their ratios to it. Step i of n has
    low·(high/low)^(i/n). The stage has no other schedule, no cycled momentum, and nothing ends it
    early.

    Raises:
      RecipeError: bounds or length give no curve, or the stage has no learning rate.
    """
    if not 0 < low < high < math.inf:
        raise RecipeError(f"learning rates rise from {low:g} to {high:g}; say 0 < low < high.")
    if steps < 10:
        raise RecipeError(f"a range test of {steps} steps shows nothing; take 10 or more.")
    if stage.linear_probe:
        raise RecipeError(
            f"stage {stage.name!r} is a linear probe: it has no learning rate that could rise."
        )
    top = highest(stage)
    return dataclasses.replace(
        stage,
        train={
            pattern: dataclasses.replace(update, lr=update.lr / top * low, schedule=None)
            for pattern, update in stage.updates.items()
        },
        schedule=ExponentialLR((high / low) ** (1 / steps), by="step"),
        epochs=None,
        steps=steps,
        until=None,
        max_minutes=None,
        ema=None,
    )


def range_test(trial: Trial, *, low: float, high: float) -> Curve:
    """Takes the steps of a trial of a `ramp` stage between the same learning rates.

    Relative learning rates are measured once, before the first step.

    Raises:
      RecipeError: a batch does not fit into memory.
    """
    with trial.program.fitting_memory():
        return _range_test(trial, low, high)


def _range_test(trial: Trial, low: float, high: float) -> Curve:
    program = trial.program
    compiled, state, frozen = trial.compile()
    start = trial.params if program.plan.stage.anchor else None
    if compiled.gradient_norms:
        first = trial.batches(min(BATCHES, program.epoch_length(0)))
        state = restart_with_auto_rgn(
            compiled, program.devices, state, frozen, first, step=0, rest=[start]
        )
    losses: list[float] = []
    for step, batch in enumerate(trial.batches(program.steps)):
        state, record = compiled.step(state, frozen, batch, np.int32(step), start)
        metrics = jax.device_get(record.metrics)
        losses.append(float(metrics.loss / metrics.examples))
        smoothed = smooth(losses)
        if not math.isfinite(losses[-1]) or smoothed[-1] > DIVERGED * smoothed.min():
            break
    lrs = [low * (high / low) ** (step / program.steps) for step in range(len(losses))]
    return Curve(program.steps, lrs, losses)
