"""The protocol of learning-rate schedules, and the arithmetic that they share."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log, pi
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

Unit = Literal["epoch", "step"]
Shape = Literal["cos", "linear"]
Time = jax.Array | int
Number = jax.Array | float


@runtime_checkable
class Schedule(Protocol):
    """Learning rate and optional momentum as functions of time: epoch (or step) t is time t."""

    @property
    def by(self) -> Unit:
        """Unit of time: `epoch` or `step`."""

    def lr_at(self, lr: Number, t: Time, total: int) -> jax.Array:
        """Returns the learning rate at a time.

        Args:
          lr: base learning rate of the group.
          t: time from the start of the schedule, from 0; an array [...] of times, possibly traced.
          total: length of the schedule in the same unit; static.

        Returns:
          Learning rates [...] of JAX's default float type.
        """

    def momentum(self, t: Time, total: int) -> jax.Array | None:
        """Returns the momentum (Adam: b1) at a time [...], or None if the schedule has none."""
        return None


@dataclass(frozen=True)
class Span:
    """Steps that a schedule covers: those of its stage, or of several stages.

    Attributes:
      steps: number of steps.
      epochs: number of epochs; the last one of each stage may be incomplete.
      steps_per_epoch: converts steps of this stage to epochs.
      steps_before, epochs_before: the part before this stage.
    """

    steps: int
    epochs: int
    steps_per_epoch: int
    steps_before: int = 0
    epochs_before: int = 0

    def time(self, by: Unit, position: Time) -> tuple[Time, int]:
        """Returns the time and the length of a schedule.

        Args:
          by: unit of the schedule.
          position: steps since the start of the stage.
        """
        if by == "epoch":
            return self.epochs_before + position // self.steps_per_epoch, self.epochs
        return self.steps_before + position, self.steps


def interpolate(knots: Sequence[Number], ends: Sequence[float], t: Time, shape: Shape) -> jax.Array:
    """Interpolates between knots, the first at time 0, the others at `ends`; then constant."""
    t = to_float(t)
    value = jnp.full_like(t, knots[-1])
    segments = list(zip((0.0, *ends), ends, knots, knots[1:], strict=False))
    for start, end, a, b in reversed(segments):
        if start >= end:  # an empty phase
            continue
        weight_a, weight_b = (end - t) / (end - start), (t - start) / (end - start)
        if shape == "cos":  # (1 ± cos(π·weight_b))/2, in a form that is precise near 0
            weight_a, weight_b = jnp.sin(pi / 2 * weight_a) ** 2, jnp.sin(pi / 2 * weight_b) ** 2
        value = jnp.where(t <= end, a * weight_a + b * weight_b, value)
    return value


def power(gamma: float, n: Time) -> jax.Array:
    """Returns gamma^n."""
    # Python's log is in double precision: with float32, the rounding error would grow with n.
    return jnp.exp(log(gamma) * to_float(n))


def to_float(x: Number) -> jax.Array:
    """Returns an array of JAX's default float type."""
    return jnp.asarray(x, jnp.result_type(float))
