"""Learning-rate schedules of torch, fastai and ULMFiT as closed forms of the step within a stage.

Closed forms have no state: an interrupted run resumes them exactly, and each stage starts at time
0. `ReduceLROnPlateau`, which depends on validation scores, is in `jaxft.optim.plateau`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from math import floor
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.dataclass_checks import checked
from jaxft.optim.argument_checks import TORCH_HINTS, RangeChecked
from jaxft.optim.lambda_lr import LambdaLR
from jaxft.optim.periodic_schedules import CosineAnnealingWarmRestarts, CyclicLR
from jaxft.optim.schedule_base import (
    Number,
    Schedule,
    Shape,
    Time,
    Unit,
    interpolate,
    power,
    to_float,
)

__all__ = [
    "ClosedForm", "Constant", "CosineAnnealingLR", "CosineAnnealingWarmRestarts", "CyclicLR",
    "ExponentialLR", "FastaiOneCycle", "LambdaLR", "LinearLR", "MultiStepLR", "OneCycleLR",
    "PolynomialLR", "Schedule", "SlantedTriangular", "StepLR", "Warmup",
]  # fmt: skip


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class Constant(RangeChecked, Schedule):
    """A constant learning rate."""

    by: Unit = "epoch"

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns lr."""
        return jnp.full_like(to_float(t), lr)


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class StepLR(RangeChecked, Schedule):
    """Multiplies the learning rate by gamma every step_size, as torch's `StepLR`."""

    step_size: int
    gamma: float = 0.1
    by: Unit = "epoch"

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns lr·gamma^⌊t/step_size⌋."""
        return lr * power(self.gamma, jnp.asarray(t) // self.step_size)


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class MultiStepLR(RangeChecked, Schedule):
    """Multiplies the learning rate by gamma at each milestone, as torch's `MultiStepLR`."""

    milestones: tuple[int, ...]
    gamma: float = 0.1
    by: Unit = "epoch"

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns lr·gamma^(number of milestones at or before t)."""
        return lr * power(self.gamma, sum(jnp.asarray(t) >= m for m in self.milestones))


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class ExponentialLR(RangeChecked, Schedule):
    """Multiplies the learning rate by gamma each epoch or step, as torch's `ExponentialLR`."""

    gamma: float
    by: Unit = "epoch"

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns lr·gamma^t."""
        return lr * power(self.gamma, t)


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class CosineAnnealingLR(RangeChecked, Schedule):
    """Anneals from lr to eta_min along half a cosine, as torch's `CosineAnnealingLR`.

    Attributes:
      t_max: time of the minimum; by default the end of the stage, one unit after the last epoch or
        step. After t_max the learning rate rises again, as in torch.
      eta_min: minimum learning rate.

    Example:
      >>> [f"{CosineAnnealingLR().lr_at(1.0, t, total=4):.2f}" for t in range(5)]
      ['1.00', '0.85', '0.50', '0.15', '0.00']
    """

    t_max: int | None = None
    eta_min: float = 0.0
    by: Unit = "epoch"

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns eta_min + (lr - eta_min)·(1 + cos(π·t/t_max))/2."""
        end = self.t_max or total
        reflected = end - abs(end - jnp.asarray(t) % (2 * end))
        return interpolate([lr, self.eta_min], [end], reflected, "cos")


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class PolynomialLR(RangeChecked, Schedule):
    """Decays to 0 at total_iters, by default the end of the stage, as torch's `PolynomialLR`."""

    total_iters: int | None = None
    power: float = 1.0
    by: Unit = "epoch"

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns lr·(1 - t/total_iters)^power until total_iters, then 0."""
        end = self.total_iters or total
        return lr * (jnp.maximum(end - to_float(t), 0) / end) ** self.power


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class LinearLR(RangeChecked, Schedule):
    """Changes linearly from one multiple of lr to another, then stays, as torch's `LinearLR`.

    Unlike torch, start_factor may be 0.
    """

    start_factor: float = 1 / 3
    end_factor: float = 1.0
    total_iters: int = 5
    by: Unit = "epoch"

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns lr·(start_factor + (end_factor - start_factor)·min(t/total_iters, 1))."""
        factors = [self.start_factor, self.end_factor]
        return lr * interpolate(factors, [self.total_iters], t, "linear")


@checked("then", **TORCH_HINTS)
@dataclass(frozen=True)
class Warmup(RangeChecked, Schedule):
    """Rises linearly to lr, then follows another schedule.

    Equals torch's `SequentialLR([LinearLR(start_factor, total_iters=length), then], [length])`.

    Attributes:
      length: duration of the rise, in the unit of `then`.
      then: schedule after the rise, for the rest of the stage.
      start_factor: multiple of lr at time 0.

    Example:
      >>> schedule = Warmup(2, then=CosineAnnealingLR(by="step"), start_factor=0.5)
      >>> schedule.by, [f"{schedule.lr_at(1.0, t, total=6):.2f}" for t in range(6)]
      ('step', ['0.50', '0.75', '1.00', '0.85', '0.50', '0.15'])
    """

    length: int
    then: "ClosedForm"
    start_factor: float = 1 / 3

    @classmethod
    def wrong_values(cls, values: Mapping[str, Any]) -> list[str]:
        """Returns an error message for each wrong value."""
        wrong = super().wrong_values(values)
        if "then" in values and not isinstance(values["then"], Schedule):
            wrong.append(f"then is {values['then']!r}; it must be a schedule in closed form")
        return wrong

    @property
    def by(self) -> Unit:
        """Unit of time, the same as of `then`."""
        return self.then.by

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns lr·(start_factor + (1 - start_factor)·t/length), then `then` from its time 0."""
        rise = LinearLR(self.start_factor, total_iters=self.length).lr_at(lr, t, total)
        return jnp.where(t < self.length, rise, self.then.lr_at(lr, *self._time_of_then(t, total)))

    def momentum(self, t: Time, total: int) -> jax.Array | None:
        """Returns the momentum of `then`; during the rise, its momentum at time 0."""
        return self.then.momentum(*self._time_of_then(t, total))

    def _time_of_then(self, t: Time, total: int) -> tuple[jax.Array, int]:
        return jnp.maximum(jnp.asarray(t) - self.length, 0), max(total - self.length, 1)


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class OneCycleLR(RangeChecked, Schedule):
    """The 1cycle policy (Smith 2018, arXiv:1803.09820), as torch's `OneCycleLR`.

    Rises from lr/div_factor to lr and falls to lr/(div_factor·final_div_factor), while the momentum
    moves the other way. Unlike torch, the peak may be at the first step, and the last values stay
    after total_steps.

    Attributes:
      total_steps: length of the cycle; by default the stage.
      pct_start: fraction of the cycle that rises.
      anneal_strategy: `cos` or `linear`.
      cycle_momentum: whether the momentum (Adam: b1) moves too.
      base_momentum: momentum at the peak.
      max_momentum: momentum at both ends.
      div_factor: lr divided by the initial learning rate.
      final_div_factor: initial learning rate divided by the last one.
      three_phase: whether to fall to lr/div_factor as fast as it rose, and then to the last value.
    """

    total_steps: int | None = None
    pct_start: float = 0.3
    anneal_strategy: Shape = "cos"
    cycle_momentum: bool = True
    base_momentum: float = 0.85
    max_momentum: float = 0.95
    div_factor: float = 25.0
    final_div_factor: float = 1e4
    three_phase: bool = False
    by: Unit = "step"

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Goes from lr/div_factor through lr to lr/(div_factor·final_div_factor)."""
        low = 1 / self.div_factor
        return lr * self._cycle([low, 1.0, low, low / self.final_div_factor], t, total)

    def momentum(self, t: Time, total: int) -> jax.Array | None:
        """Goes from max_momentum through base_momentum to max_momentum; None without a cycle."""
        high, low = self.max_momentum, self.base_momentum
        return self._cycle([high, low, high, high], t, total) if self.cycle_momentum else None

    def _cycle(self, knots: list[float], t: Time, total: int) -> jax.Array:
        steps = self.total_steps or total
        peak = self.pct_start * steps - 1
        ends = [peak, 2 * peak, steps - 1]
        if not self.three_phase:
            del knots[2], ends[1]
        return interpolate(knots, ends, t, self.anneal_strategy)


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class FastaiOneCycle(RangeChecked, Schedule):
    """The 1cycle policy as fastai's `fit_one_cycle`.

    Rises from lr/div to lr and falls to lr/div_final on cosines. Unlike `OneCycleLR`, step t is at
    t/total of the cycle, so that the last step does not reach the end.

    Attributes:
      pct_start: fraction of the cycle that rises.
      div: lr divided by the initial learning rate.
      div_final: lr divided by the learning rate at the end.
      moms: momenta (Adam: b1) at the start, the peak and the end.
    """

    pct_start: float = 0.25
    div: float = 25.0
    div_final: float = 1e5
    moms: tuple[float, float, float] = (0.95, 0.85, 0.95)
    by: Unit = "step"

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Goes from lr/div through lr to lr/div_final, on cosines."""
        knots = [1 / self.div, 1.0, 1 / self.div_final]
        return lr * interpolate(knots, [self.pct_start * total, total], t, "cos")

    def momentum(self, t: Time, total: int) -> jax.Array:
        """Goes through `moms`, on cosines."""
        return interpolate(self.moms, [self.pct_start * total, total], t, "cos")


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class SlantedTriangular(RangeChecked, Schedule):
    """Slanted triangular learning rates of ULMFiT (Howard and Ruder 2018, arXiv:1801.06146).

    Rises linearly from lr/ratio to lr, then falls linearly until the end of the stage, as in the
    authors' code. The paper's formula, cut·(1/cut_frac - 1) for the length of the fall, is the same
    if total·cut_frac is whole; otherwise it may give negative learning rates.

    Attributes:
      cut_frac: fraction of the stage that rises.
      ratio: lr divided by the lowest learning rate.
    """

    cut_frac: float = 0.1
    ratio: float = 32.0
    by: Unit = "step"

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns lr·(1 + p·(ratio - 1))/ratio; p rises to 1 at ⌊total·cut_frac⌋, then falls."""
        cut = max(floor(total * self.cut_frac), 1)
        p = interpolate([0.0, 1.0, 0.0], [cut, total], t, "linear")
        return lr * (1 + p * (self.ratio - 1)) / self.ratio


ClosedForm = (
    Constant | StepLR | MultiStepLR | ExponentialLR | CosineAnnealingLR | PolynomialLR | LinearLR
    | Warmup | OneCycleLR | FastaiOneCycle | SlantedTriangular | CosineAnnealingWarmRestarts
    | CyclicLR | LambdaLR
)  # fmt: skip
"""Schedules that a recipe can hold."""
