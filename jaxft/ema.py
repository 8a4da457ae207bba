"""EMA: exponential moving average of the weights and running statistics of a stage."""

from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.dataclass_checks import checked
from jaxft.errors import RecipeError
from jaxft.labels import Tree
from jaxft.optim.gradients import select

Average = tuple[Tree, ...]
"""`(params, stats)`; if the average depends on the number of steps, `(params, stats, steps)`."""


@checked(
    beta="it is called decay",
    momentum="it is called decay",
    steps="it is called every",
    use_warmup="it is called warmup",
)
@dataclass(frozen=True)
class EMA:
    """Exponential moving average of weights and running statistics.

    It starts with the arrays at the start of the stage. An update moves it to
    `decay * average + (1 - decay) * arrays`. Validation, the best epoch and the next stage use it.

    Steps count from 1 over the whole stage. A step that `on_nonfinite="skip"` leaves out does not
    count and does not move the average.

    Attributes:
      decay: between 0 and 1, e.g. 0.9998.
      every: updates follow steps 1, 1 + every, 1 + 2 * every, and so on. torchvision's
        `--model-ema-steps` updates after the same batches of an epoch. It begins to count again in
        each epoch, which makes a difference if `every` does not divide the length of an epoch.
      warmup: whether the decay rises to `decay`, so that the start does not dominate the average of
        a short stage. Update k, counted from 1, has the decay `min(decay, 1 - k ** (-2 / 3))`; the
        first one copies the arrays. `ModelEmaV3(use_warmup=True).update(model, step=k)` of timm
        has the same decay. With `every=1`, k is the step, as in timm's training script.

    Raises:
      RecipeError: `decay` or `every` is out of range.
    """

    decay: float
    _: KW_ONLY
    every: int = 1
    warmup: bool = False

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    def __post_init__(self) -> None:
        wrong = wrong_decay("decay", self.decay)
        if self.every < 1:
            wrong.append(f"every is {self.every}; it must be at least 1")
        if wrong:
            raise RecipeError(f"EMA: {'; '.join(wrong)}.")

    @property
    def _counts_steps(self) -> bool:
        return self.every > 1 or self.warmup

    def start(self, params: Tree, stats: Tree) -> Average:
        """Returns the average at the start of a stage; copies no array."""
        return (params, stats, np.zeros((), np.int32)) if self._counts_steps else (params, stats)

    def after_step(self, average: Average, params: Tree, stats: Tree) -> Average:
        """Returns the average after a step.

        Args:
          average: the average before the step.
          params: parameters after the step; None where frozen.
          stats: running statistics after the step.

        Example:
          >>> ema = EMA(0.75, every=2)
          >>> average = ema.start({"w": jnp.zeros(())}, {})
          >>> for _ in range(3):
          ...     average = ema.after_step(average, {"w": jnp.ones(())}, {})
          ...     print(float(average[0]["w"]))
          0.25
          0.25
          0.4375
        """
        arrays = (params, stats)
        share: float | jax.Array = 1 - self.decay
        if not self._counts_steps:
            return jax.tree.map(partial(_move, share), average, arrays)
        *old, steps = average
        if self.warmup:
            update = steps // self.every + 1
            share = jnp.maximum(share, update.astype(float) ** (-2 / 3))
        new = jax.tree.map(partial(_move, share), tuple(old), arrays)
        if self.warmup:
            new = select(steps == 0, arrays, new)  # exactly; a share of 1 rounds
        if self.every > 1:
            new = select(steps % self.every == 0, new, tuple(old))
        return (*new, steps + 1)


def wrong_decay(name: str, decay: float) -> list[str]:
    """Returns what is wrong with a decay, as a list of at most one sentence."""
    return [] if 0 < decay < 1 else [f"{name} is {decay}; a decay lies between 0 and 1"]


def _move(share: float | jax.Array, average: jax.Array, x: jax.Array) -> jax.Array:
    """Moves the average by a share of the way to `x`.

    Arrays that stand still must not move: `optax.incremental_update` rounds them, and XLA on CPU
    flushes subnormal numbers to zero.
    """
    stands_still = x == average
    return jnp.where(stands_still, x, average + (share * (x - average)).astype(average.dtype))
