"""NAdam, RAdam and Adagrad as torch defines them, and Lion."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.dataclass_checks import checked
from jaxft.labels import Tree
from jaxft.optim.argument_checks import RangeChecked
from jaxft.optim.optimizer_base import HINTS, add_decay, zeros_like


class NAdamState(NamedTuple):
    """State of `NAdam`."""

    steps: jax.Array
    """Their number, int32 []."""
    mu: Tree
    """Moving averages of the gradients."""
    nu: Tree
    """Moving averages of the squared gradients."""
    b1_product: jax.Array
    """Product of the b1 of all steps, []."""


class RAdamState(NamedTuple):
    """State of `RAdam`."""

    steps: jax.Array
    """Their number, int32 []."""
    mu: Tree
    """Moving averages of the gradients."""
    nu: Tree
    """Moving averages of the squared gradients."""


class AdagradState(NamedTuple):
    """State of `Adagrad`."""

    steps: jax.Array
    """Their number, int32 []."""
    total: Tree
    """Sums of the squared gradients."""


@checked(**HINTS)
@dataclass(frozen=True, kw_only=True)
class NAdam(RangeChecked):
    """Adam with Nesterov momentum, as `torch.optim.NAdam` (Dozat 2016).

    Attributes:
      b1: decay of the average of gradients; it grows during training.
      b2: decay of the average of squared gradients.
      eps: added to the square root of that average.
      momentum_decay: speed of the growth of b1.
      weight_decay: strength of the L2 penalty, or of the decay.
      decay_vectors: whether the decay includes biases and norm layers.
      decoupled_weight_decay: whether the decay is decoupled from the moments, as in `AdamW`.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    momentum_decay: float = 4e-3
    weight_decay: float = 0.0
    decay_vectors: bool = True
    decoupled_weight_decay: bool = False
    rule: Literal["nadam"] = "nadam"

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the transform from gradients to directions, without the learning rate.

        Args:
          momentum: b1 from a schedule, []; None for the field.
        """
        b1: Any = self.b1 if momentum is None else momentum

        def init(params: Tree) -> NAdamState:
            count, product = jnp.zeros([], jnp.int32), jnp.ones([])
            return NAdamState(count, zeros_like(params), zeros_like(params), product)

        def update(
            gradients: Tree, state: NAdamState, params: Tree | None = None
        ) -> tuple[Tree, NAdamState]:
            if not self.decoupled_weight_decay:
                gradients = add_decay(self, gradients, params)
            count = state.steps + 1
            mu, nu = _moments(gradients, state, b1, self.b2)
            now, following = (
                b1 * (1 - 0.5 * 0.96 ** (self.momentum_decay * n)) for n in (count, count + 1)
            )
            product = state.b1_product * now
            of_gradient = (1 - now) / (1 - product)
            of_average = following / (1 - product * following)
            correction = 1 - self.b2**count
            updates = jax.tree.map(
                lambda g, m, v: (
                    (of_gradient * g + of_average * m) / (jnp.sqrt(v / correction) + self.eps)
                ).astype(g.dtype),
                gradients,
                mu,
                nu,
            )
            if self.decoupled_weight_decay:
                updates = add_decay(self, updates, params)
            return updates, NAdamState(count, mu, nu, product)

        return optax.GradientTransformation(init, update)


@checked(**HINTS)
@dataclass(frozen=True, kw_only=True)
class RAdam(RangeChecked):
    """Rectified Adam, as `torch.optim.RAdam` (Liu et al. 2019, arXiv:1908.03265).

    The first steps do not divide by the average of squared gradients, which is unreliable then.

    Attributes:
      b1: decay of the average of gradients.
      b2: decay of the average of squared gradients.
      eps: added to the square root of that average.
      weight_decay: strength of the L2 penalty, or of the decay.
      decay_vectors: whether the decay includes biases and norm layers.
      decoupled_weight_decay: whether the decay is decoupled from the moments, as in `AdamW`.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_vectors: bool = True
    decoupled_weight_decay: bool = False
    rule: Literal["radam"] = "radam"

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the transform from gradients to directions, without the learning rate.

        Args:
          momentum: b1 from a schedule, []; None for the field.
        """
        b1: Any = self.b1 if momentum is None else momentum
        limit = 2 / (1 - self.b2) - 1  # of `length`

        def init(params: Tree) -> RAdamState:
            return RAdamState(jnp.zeros([], jnp.int32), zeros_like(params), zeros_like(params))

        def update(
            gradients: Tree, state: RAdamState, params: Tree | None = None
        ) -> tuple[Tree, RAdamState]:
            if not self.decoupled_weight_decay:
                gradients = add_decay(self, gradients, params)
            count = state.steps + 1
            mu, nu = _moments(gradients, state, b1, self.b2)
            correction1, correction2 = 1 - b1**count, 1 - self.b2**count
            # Length of the simple moving average that b2 approximates. 5 and below: no division.
            length = limit - 2 * count * self.b2**count / correction2
            is_long = length > 5
            length, maximum = jnp.where(is_long, length, 6.0), max(limit, 5.0)
            rectification = jnp.sqrt(
                (length - 4) * (length - 2) * maximum
                / ((maximum - 4) * (maximum - 2) * length) * correction2
            )  # fmt: skip
            updates = jax.tree.map(
                lambda g, m, v: (
                    m
                    / correction1
                    * jnp.where(is_long, rectification / (jnp.sqrt(v) + self.eps), 1)
                ).astype(g.dtype),
                gradients,
                mu,
                nu,
            )
            if self.decoupled_weight_decay:
                updates = add_decay(self, updates, params)
            return updates, RAdamState(count, mu, nu)

        return optax.GradientTransformation(init, update)


@checked(**HINTS)
@dataclass(frozen=True, kw_only=True)
class Adagrad(RangeChecked):
    """Adagrad, as `torch.optim.Adagrad` (Duchi et al. 2011).

    It has no momentum, so a schedule changes its learning rate alone.

    Attributes:
      lr_decay: after n steps the learning rate is divided by 1 + n·lr_decay.
      initial_accumulator_value: initial sum of the squared gradients.
      eps: added to the square root of that sum.
      weight_decay: strength of the L2 penalty, added to the gradient.
      decay_vectors: whether the decay includes biases and norm layers.
    """

    lr_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    weight_decay: float = 0.0
    decay_vectors: bool = True
    rule: Literal["adagrad"] = "adagrad"

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the transform from gradients to directions, without the learning rate.

        Args:
          momentum: has no effect.
        """

        def init(params: Tree) -> AdagradState:
            total = jax.tree.map(lambda p: jnp.full_like(p, self.initial_accumulator_value), params)
            return AdagradState(jnp.zeros([], jnp.int32), total)

        def update(
            gradients: Tree, state: AdagradState, params: Tree | None = None
        ) -> tuple[Tree, AdagradState]:
            gradients = add_decay(self, gradients, params)
            total = jax.tree.map(lambda g, t: t + g * g, gradients, state.total)
            decay = 1 + state.steps * self.lr_decay
            updates = jax.tree.map(
                lambda g, t: (g / (jnp.sqrt(t) + self.eps) / decay).astype(g.dtype),
                gradients,
                total,
            )
            return updates, AdagradState(state.steps + 1, total)

        return optax.GradientTransformation(init, update)


@checked(**HINTS)
@dataclass(frozen=True, kw_only=True)
class Lion(RangeChecked):
    """Lion (Chen et al. 2023, arXiv:2302.06675): steps by the sign of an average of gradients.

    Its steps are larger than Adam's. The authors use a learning rate 3 to 10 times smaller than for
    `AdamW`, and a weight decay larger by the same factor.

    Attributes:
      b1: weight of the average in the step.
      b2: decay of the average of gradients.
      weight_decay: strength of the decay, decoupled as in `AdamW`.
      decay_vectors: whether the decay includes biases and norm layers.
    """

    b1: float = 0.9
    b2: float = 0.99
    weight_decay: float = 0.0
    decay_vectors: bool = True
    rule: Literal["lion"] = "lion"

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the transform from gradients to directions, without the learning rate.

        Args:
          momentum: b1 from a schedule, []; None for the field.
        """
        b1: Any = self.b1 if momentum is None else momentum
        lion = optax.scale_by_lion(b1, self.b2)

        def update(
            gradients: Tree, state: optax.OptState, params: Tree | None = None
        ) -> tuple[Tree, optax.OptState]:
            updates, state = lion.update(gradients, state)
            return add_decay(self, updates, params), state

        return optax.GradientTransformation(lion.init, update)


def _moments(
    gradients: Tree, state: NAdamState | RAdamState, b1: Any, b2: float
) -> tuple[Tree, Tree]:
    """Returns the averages of gradients and of squared gradients after a step."""
    mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, gradients, state.mu)
    nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, gradients, state.nu)
    return mu, nu
