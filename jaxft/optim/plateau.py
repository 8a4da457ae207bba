"""ReduceLROnPlateau: the schedule that depends on validation scores and therefore has a state."""

from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.dataclass_checks import checked
from jaxft.optim.argument_checks import TORCH_HINTS, RangeChecked


class PlateauState(NamedTuple):
    """State of a `ReduceLROnPlateau`."""

    best: float | jax.Array
    """Best value of the metric."""
    bad: int | jax.Array = 0
    """Epochs in a row without improvement."""
    cooldown: int | jax.Array = 0
    """Remaining epochs of the cooldown, which do not count."""
    reductions: int | jax.Array = 0
    """Number of reductions."""

    def as_arrays(self) -> "PlateauState":
        """Returns the state as scalar arrays of JAX's default types, for an optimizer state."""
        return PlateauState(*(jnp.asarray(x, jnp.result_type(type(x))) for x in self))


@checked(**TORCH_HINTS)
@dataclass(frozen=True)
class ReduceLROnPlateau(RangeChecked):
    """Reduces the learning rate when a metric stops improving, as torch's `ReduceLROnPlateau`.

    Attributes:
      mode: whether `min` or `max` is better. A stage watches the validation loss with `min`, the
        accuracy with `max`.
      factor: multiplies the learning rate after patience + 1 epochs without improvement.
      patience: number of epochs.
      threshold: smallest improvement that counts.
      threshold_mode: whether the threshold is relative to the best value (`rel`) or absolute.
      cooldown: epochs after a reduction that do not count.
      min_lr: lower bound of the learning rate.
      eps: smaller reductions are skipped.

    Example:
      >>> plateau = ReduceLROnPlateau(patience=0, factor=0.5)
      >>> state = plateau.after_epoch(plateau.start(), 0.5)
      >>> float(plateau.lr_at(8.0, plateau.after_epoch(state, 0.5)))
      4.0
    """

    mode: Literal["min", "max"] = "min"
    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: int = 0
    min_lr: float = 0.0
    eps: float = 1e-8

    def start(self) -> PlateauState:
        """Returns the state before the first epoch."""
        return PlateauState(best=inf if self.mode == "min" else -inf)

    def after_epoch(self, state: PlateauState, value: float) -> PlateauState:
        """Returns the state after an epoch.

        Args:
          state: state before the epoch.
          value: metric of the epoch; NaN is no improvement.
        """
        best, bad, cooldown, reductions = state
        sign = 1 if self.mode == "max" else -1
        margin = sign * self.threshold
        target = best * (1 + margin) if self.threshold_mode == "rel" else best + margin
        improved = sign * value > sign * target
        best, bad = (float(value), 0) if improved else (best, bad + 1)
        if cooldown:
            cooldown, bad = cooldown - 1, 0
        if bad > self.patience:
            cooldown, bad, reductions = self.cooldown, 0, reductions + 1
        return PlateauState(best, bad, cooldown, reductions)

    def lr_at(self, lr: float | jax.Array, state: PlateauState) -> jax.Array:
        """Returns the learning rate, [], of a group with base learning rate `lr`."""

        def reduce(_: int, current_lr: jax.Array) -> jax.Array:
            reduced_lr = jnp.maximum(current_lr * self.factor, self.min_lr)
            return jnp.where(current_lr - reduced_lr > self.eps, reduced_lr, current_lr)

        base_lr = jnp.asarray(lr, jnp.result_type(float))
        return jax.lax.fori_loop(0, state.reductions, reduce, base_lr)
