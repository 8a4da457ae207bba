"""Schedules that repeat: cyclical learning rates and cosine annealing with warm restarts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxft.dataclass_checks import checked
from jaxft.optim.argument_checks import TORCH_HINTS, RangeChecked
from jaxft.optim.schedule_base import Number, Schedule, Time, Unit, interpolate, power


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class CosineAnnealingWarmRestarts(RangeChecked, Schedule):
    """SGDR (Loshchilov and Hutter 2016, arXiv:1608.03983), as torch's schedule of this name.

    Anneals from lr to eta_min along half a cosine, then starts again at lr.

    Attributes:
      t_0: length of the first period.
      t_mult: each period is so many times as long as the one before it.
      eta_min: minimum learning rate.

    Example:
      >>> schedule = CosineAnnealingWarmRestarts(2, t_mult=2)
      >>> [f"{schedule.lr_at(1.0, t, total=8):.2f}" for t in range(8)]
      ['1.00', '0.50', '1.00', '0.85', '0.50', '0.15', '1.00', '0.96']
    """

    t_0: int
    t_mult: int = 1
    eta_min: float = 0.0
    by: Unit = "epoch"

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns eta_min + (lr - eta_min)·(1 + cos(π·t/length))/2, t from the period's start."""
        t = jnp.asarray(t)
        start, length, knots = 0, self.t_0, [lr, self.eta_min]
        if self.t_mult == 1:
            return interpolate(knots, [length], t % length, "cos")
        value = interpolate(knots, [length], t, "cos")
        while start + length <= total:
            start, length = start + length, length * self.t_mult
            value = jnp.where(t < start, value, interpolate(knots, [length], t - start, "cos"))
        return value


@checked(
    base_lr="it is the group's learning rate, the maximum, divided by div_factor",
    scale_fn="LambdaLR('my_module:factor') takes a function",
    scale_mode="LambdaLR('my_module:factor') takes a function",
    **TORCH_HINTS,
)
@dataclass(frozen=True)
class CyclicLR(RangeChecked, Schedule):
    """Cyclical learning rates (Smith 2015, arXiv:1506.01186), as torch's `CyclicLR`.

    Rises linearly from lr/div_factor to lr and falls back, while the momentum moves the other way.

    Attributes:
      step_size_up: length of the rise.
      step_size_down: length of the fall; by default that of the rise.
      div_factor: lr divided by the lowest learning rate. The author recommends 3 or 4.
      mode: height of the cycles. `triangular`: the same for all; `triangular2`: half of the one
        before; `exp_range`: multiplied by gamma each epoch or step.
      gamma: for `exp_range`.
      cycle_momentum: whether the momentum (Adam: b1) moves too.
      base_momentum: momentum at the peak.
      max_momentum: momentum at the start of a cycle.

    Example:
      >>> schedule = CyclicLR(2, mode="triangular2")
      >>> [f"{schedule.lr_at(1.0, t, total=8):.2f}" for t in range(8)]
      ['0.25', '0.62', '1.00', '0.62', '0.25', '0.44', '0.62', '0.44']
    """

    step_size_up: int = 2000
    step_size_down: int | None = None
    div_factor: float = 4.0
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: float = 1.0
    cycle_momentum: bool = True
    base_momentum: float = 0.8
    max_momentum: float = 0.9
    by: Unit = "step"

    @classmethod
    def wrong_values(cls, values: Mapping[str, Any]) -> list[str]:
        """Returns an error message for each wrong value."""
        wrong = super().wrong_values(values)
        if values.get("gamma", 1.0) != 1.0 and values.get("mode") != "exp_range":
            wrong.append("gamma needs mode='exp_range'")
        return wrong

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Goes between lr/div_factor and lr."""
        low = 1 / self.div_factor
        return lr * (low + (1 - low) * self._height(t))

    def momentum(self, t: Time, total: int) -> jax.Array | None:
        """Goes between max_momentum and base_momentum; None without a cycle."""
        if not self.cycle_momentum:
            return None
        height = self._height(t)
        return self.max_momentum * (1 - height) + self.base_momentum * height

    def _height(self, t: Time) -> jax.Array:
        """Returns the position between the lowest learning rate, 0, and lr, 1."""
        up = self.step_size_up
        period = up + (self.step_size_down or up)
        t = jnp.asarray(t)
        triangle = interpolate([0.0, 1.0, 0.0], [up, period], t % period, "linear")
        if self.mode == "triangular2":
            return triangle * power(0.5, t // period)
        return triangle * power(self.gamma, t) if self.mode == "exp_range" else triangle
