"""The range test: the loss while the rate rises, and the rates that it suggests.

Smith 2015 (arXiv:1506.01186), in the form of fastai's `lr_find`, whose numbers these are.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxft.errors import RecipeError
from jaxft.optim.schedules import ExponentialLR
from jaxft.stages import Stage
from jaxft.train.auto_rgn import BATCHES, set_out
from jaxft.train.memory import fitting_memory
from jaxft.train.trial import Trial

BETA = 0.98
DIVERGED = 4.0  # times the best smoothed loss
UNSETTLED = 5  # last points, which no rule looks at; nor at the first tenth of the steps


@dataclass(frozen=True)
class Curve:
    """What a range test saw.

    Attributes:
      steps: that it was to take; it ends earlier once the loss has diverged.
      rates: of each step; of several groups, that of the highest.
      losses: of each step's batch, before the step; one that is not finite is the last.
    """

    steps: int
    rates: Sequence[float]
    losses: Sequence[float]

    @property
    def smoothed(self) -> np.ndarray:
        """The losses' exponential average, with the bias of its start taken out."""
        return smooth(self.losses)

    def suggestions(self) -> dict[str, float]:
        """A rate by each of the `RULES`.

        Raises RecipeError if the loss diverged before there was anything to judge by.
        """
        losses = self.smoothed
        lost = np.flatnonzero(~np.isfinite(losses))
        seen = slice(self.steps // 10, lost[0] if len(lost) else max(len(losses) - UNSETTLED, 0))
        rates, losses = np.asarray(self.rates)[seen], losses[seen]
        if len(rates) < 2:
            raise RecipeError(
                f"the loss diverged in {len(self.losses)} of {self.steps} steps, at a rate of "
                f"{self.rates[-1]:.1e}; there is no curve. Begin lower."
            )
        return {name: rule(rates, losses) for name, rule in RULES.items()}


def smooth(losses: Sequence[float], beta: float = BETA) -> np.ndarray:
    """v = beta·v + (1 - beta)·loss from 0, over 1 - beta^k after k losses."""
    average, found = 0.0, []
    for count, loss in enumerate(losses, 1):
        average = beta * average + (1 - beta) * loss
        found.append(average / (1 - beta**count))
    return np.array(found)


def valley(rates: np.ndarray, losses: np.ndarray) -> float:
    """Half way down the longest fall: fastai's default.

    Its length is that of the longest decreasing subsequence, and its end the first point that one
    of that length can end in; it is taken to be so many points in a row.
    """
    longest = np.ones(len(losses), int)
    for i in range(1, len(losses)):
        longest[i] += max(longest[:i][losses[:i] > losses[i]], default=0)
    end = int(longest.argmax())
    length = int(longest[end]) if longest[end] > 1 else 0
    third = length / 3
    return float(rates[max(end - length + int(third) + int(third / 2), 0)])


def steepest(rates: np.ndarray, losses: np.ndarray) -> float:
    """Where the loss falls fastest, by the logarithm of the rate."""
    return float(rates[np.argmin(np.diff(losses) / np.diff(np.log(rates)))])


def tenth_of_minimum(rates: np.ndarray, losses: np.ndarray) -> float:
    """A tenth of the rate with the lowest loss."""
    return float(rates[np.argmin(losses)]) / 10


RULES: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "valley": valley,
    "steepest": steepest,
    "minimum / 10": tenth_of_minimum,
}


def highest(stage: Stage) -> float:
    """The largest base rate of a stage."""
    return max(update.lr for update in stage.updates.values())


def ramp(stage: Stage, *, low: float, high: float, steps: int) -> Stage:
    """The stage as its range test has it: its highest rate rises from `low` towards `high`.

    The other groups' rates keep their ratios to it. Step i of n has low·(high/low)^(i/n). There is
    no schedule, and of the optimizer no momentum that one cycles; nothing ends the stage early.

    Raises RecipeError for bounds or a length of which there is no curve, and for a solved stage.
    """
    if not 0 < low < high < math.inf:
        raise RecipeError(f"rates rise from {low:g} to {high:g}; say 0 < low < high.")
    if steps < 10:
        raise RecipeError(f"a range test of {steps} steps shows nothing; take 10 or more.")
    if stage.solver:
        raise RecipeError(f"stage {stage.name!r} is solved: it has no rate that could rise.")
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
        minutes=None,
        ema=None,
    )


def range_test(trial: Trial, *, low: float, high: float) -> Curve:
    """Takes the steps of a trial of a `ramp` stage between the same rates.

    Relative rates are measured once, before the first step. Raises RecipeError for a batch that
    does not fit into memory.
    """
    with fitting_memory(trial.program):
        return _range_test(trial, low, high)


def _range_test(trial: Trial, low: float, high: float) -> Curve:
    program = trial.program
    compiled, state, frozen = trial.compile()
    start = trial.params if program.plan.stage.anchor else None
    if compiled.gauge:
        first = trial.batches(min(BATCHES, program.epoch_length(0)))
        state = set_out(compiled, program.devices, state, frozen, first, step=0, start=start)
    losses: list[float] = []
    for step, batch in enumerate(trial.batches(program.steps)):
        state, record = compiled.step(state, frozen, batch, np.int32(step), start)
        metrics = jax.device_get(record.metrics)
        losses.append(float(metrics.loss / metrics.examples))
        smoothed = smooth(losses)
        if not math.isfinite(losses[-1]) or smoothed[-1] > DIVERGED * smoothed.min():
            break
    rates = [low * (high / low) ** (step / program.steps) for step in range(len(losses))]
    return Curve(program.steps, rates, losses)
