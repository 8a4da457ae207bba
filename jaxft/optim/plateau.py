"""The schedule that depends on what validation says, with a state of its own."""

from dataclasses import dataclass
from math import inf
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxft.dataclass_checks import checked
from jaxft.optim.schedules import OF_TORCH, Checked


class PlateauState(NamedTuple):
    """A ReduceLROnPlateau's counts: bad epochs in a row, epochs still to ignore, reductions."""

    best: float | jax.Array
    bad: int | jax.Array = 0
    cooldown: int | jax.Array = 0
    reductions: int | jax.Array = 0

    def as_arrays(self) -> "PlateauState":
        """The same as it lies in an optimizer's state: scalars of jax's default types."""
        return PlateauState(*(jnp.asarray(x, jnp.result_type(type(x))) for x in self))


@checked(**OF_TORCH)
@dataclass(frozen=True)
class ReduceLROnPlateau(Checked):
    """`torch.optim.lr_scheduler.ReduceLROnPlateau`: times factor after patience + 1 bad epochs.

    >>> plateau = ReduceLROnPlateau(patience=0, factor=0.5)
    >>> state = plateau.after_epoch(plateau.start(), 0.5)
    >>> float(plateau.rate(8.0, plateau.after_epoch(state, 0.5)))
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
        """The state before the first epoch."""
        return PlateauState(best=inf if self.mode == "min" else -inf)

    def after_epoch(self, state: PlateauState, value: float) -> PlateauState:
        """The state after an epoch with this value of the metric; NaN is a bad one."""
        best, bad, cooldown, reductions = state
        sign = 1 if self.mode == "max" else -1
        margin = sign * self.threshold
        bar = best * (1 + margin) if self.threshold_mode == "rel" else best + margin
        best, bad = (float(value), 0) if sign * value > sign * bar else (best, bad + 1)
        if cooldown:
            cooldown, bad = cooldown - 1, 0
        if bad > self.patience:
            cooldown, bad, reductions = self.cooldown, 0, reductions + 1
        return PlateauState(best, bad, cooldown, reductions)

    def rate(self, lr: float | jax.Array, state: PlateauState) -> jax.Array:
        """A group's learning rate; each reduction stops at min_lr and is skipped if within eps."""

        def reduce(_: int, lr: jax.Array) -> jax.Array:
            reduced = jnp.maximum(lr * self.factor, self.min_lr)
            return jnp.where(lr - reduced > self.eps, reduced, lr)

        start = jnp.asarray(lr, jnp.result_type(float))
        return jax.lax.fori_loop(0, state.reductions, reduce, start)
