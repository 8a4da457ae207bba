"""SGD, Adam, AdamW and RMSprop as torch defines them; the union of all optimizers.

Each returns update directions; `jaxft.optim.transform` multiplies them by the learning rate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxft.dataclass_checks import checked
from jaxft.labels import Tree
from jaxft.optim.adaptive_optimizers import Adagrad, Lion, NAdam, RAdam
from jaxft.optim.argument_checks import RangeChecked
from jaxft.optim.optax_rule import Optax
from jaxft.optim.optimizer_base import HINTS, add_decay, zeros_like


class SGDState(NamedTuple):
    """State of `SGD`; all fields are None without momentum.

    The layout does not depend on hyperparameters, because `carry` matches states field by field.
    """

    buffer: Tree | None = None
    """Momentum buffers; zeros before the first gradient."""
    started: jax.Array | None = None
    """Whether `buffer` holds a gradient, bool []. Torch does not dampen the first one."""


class RMSpropState(NamedTuple):
    """State of `RMSprop`; `mu` is None unless centered, `buffer` is None without momentum."""

    nu: Tree
    """Moving averages of the squared gradients."""
    mu: Tree | None
    """Moving averages of the gradients."""
    buffer: Tree | None
    """Momentum buffers."""


class AMSGradState(NamedTuple):
    """State of `Adam` and `AdamW` with `amsgrad`."""

    steps: jax.Array
    """Their number, int32 []."""
    mu: Tree
    """Moving averages of the gradients."""
    nu: Tree
    """Moving averages of the squared gradients."""
    nu_max: Tree
    """Largest `nu` of all steps."""


@checked(**HINTS)
@dataclass(frozen=True, kw_only=True)
class SGD(RangeChecked):
    """Stochastic gradient descent, as `torch.optim.SGD`.

    Weight decay is added to the gradient. The learning rate multiplies the momentum buffer rather
    than the gradients in it.

    Attributes:
      momentum: factor of the momentum buffer.
      dampening: the gradient enters the buffer times `1 - dampening`.
      nesterov: whether to use Nesterov momentum, which needs a momentum and no dampening.
      weight_decay: strength of the L2 penalty.
      decay_vectors: whether the decay includes biases and norm layers, that is one-dimensional
        parameters and those called `bias` or `scale`.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_vectors: bool = True
    rule: Literal["sgd"] = "sgd"

    @classmethod
    def wrong_values(cls, values: Mapping[str, Any]) -> list[str]:
        """Returns an error message for each value that torch rejects."""
        wrong = super().wrong_values(values)
        if values.get("nesterov") and (not values.get("momentum") or values.get("dampening")):
            wrong.append("nesterov needs a momentum and no dampening")
        return wrong

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the transform from gradients to directions, without the learning rate.

        Args:
          momentum: momentum from a schedule, []; None for the field.
        """
        factor = self.momentum if momentum is None else momentum

        def init(params: Tree) -> SGDState:
            if _is_disabled(factor):
                return SGDState()
            return SGDState(zeros_like(params), jnp.zeros([], bool))

        def update(
            gradients: Tree, state: SGDState, params: Tree | None = None
        ) -> tuple[Tree, SGDState]:
            gradients = add_decay(self, gradients, params)
            if _is_disabled(factor):
                return gradients, state
            assert state.started is not None
            dampened = gradients
            if self.dampening:
                scale = jnp.where(state.started, 1 - self.dampening, 1.0)
                dampened = jax.tree.map(lambda g: scale.astype(g.dtype) * g, gradients)
            buffer = _add_momentum(dampened, state.buffer, factor)
            updates = _add_momentum(gradients, buffer, factor) if self.nesterov else buffer
            # Reads `started`: a step does not donate an array that it does not read.
            return updates, SGDState(buffer, state.started | True)

        return optax.GradientTransformation(init, update)


@checked(**HINTS)
@dataclass(frozen=True, kw_only=True)
class Adam(RangeChecked):
    """Adam, as `torch.optim.Adam` (Kingma and Ba 2014, arXiv:1412.6980).

    Weight decay is added to the gradient, before the moments.

    Attributes:
      b1: decay of the average of gradients.
      b2: decay of the average of squared gradients.
      eps: added to the square root of that average.
      weight_decay: strength of the L2 penalty.
      decay_vectors: whether the decay includes biases and norm layers.
      amsgrad: whether to divide by the largest average of squared gradients so far (Reddi et al.
        2018, arXiv:1904.09237). Its state differs, so a stage that changes it resets it.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_vectors: bool = True
    amsgrad: bool = False
    rule: Literal["adam"] = "adam"

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the transform from gradients to directions, without the learning rate.

        Args:
          momentum: b1 from a schedule, []; None for the field.
        """
        adam = _adam(self, momentum)

        def update(
            gradients: Tree, state: optax.OptState, params: Tree | None = None
        ) -> tuple[Tree, optax.OptState]:
            updates, state = adam.update(add_decay(self, gradients, params), state)
            return updates, state

        return optax.GradientTransformation(adam.init, update)


@checked(**HINTS)
@dataclass(frozen=True, kw_only=True)
class AdamW(RangeChecked):
    """Adam with decoupled weight decay, as `torch.optim.AdamW` (arXiv:1711.05101).

    Each step subtracts `lr * weight_decay * parameter`; the moments do not see the decay.

    Attributes:
      b1: decay of the average of gradients.
      b2: decay of the average of squared gradients.
      eps: added to the square root of that average.
      weight_decay: strength of the decay.
      decay_vectors: whether the decay includes biases and norm layers.
      amsgrad: whether to divide by the largest average of squared gradients so far (Reddi et al.
        2018, arXiv:1904.09237). Its state differs, so a stage that changes it resets it.
    """

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    decay_vectors: bool = True
    amsgrad: bool = False
    rule: Literal["adamw"] = "adamw"

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the transform from gradients to directions, without the learning rate.

        Args:
          momentum: b1 from a schedule, []; None for the field.
        """
        adam = _adam(self, momentum)

        def update(
            gradients: Tree, state: optax.OptState, params: Tree | None = None
        ) -> tuple[Tree, optax.OptState]:
            updates, state = adam.update(gradients, state)
            return add_decay(self, updates, params), state

        return optax.GradientTransformation(adam.init, update)


@checked(**HINTS)
@dataclass(frozen=True, kw_only=True)
class RMSprop(RangeChecked):
    """RMSprop, as `torch.optim.RMSprop`.

    As in torch, eps is added outside of the square root, and the learning rate multiplies the
    momentum buffer.

    Attributes:
      alpha: decay of the average of squared gradients.
      eps: added to the square root of that average.
      momentum: factor of the momentum buffer.
      centered: whether to divide by the standard deviation of the gradients instead.
      weight_decay: strength of the L2 penalty, added to the gradient.
      decay_vectors: whether the decay includes biases and norm layers.
    """

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    weight_decay: float = 0.0
    decay_vectors: bool = True
    rule: Literal["rmsprop"] = "rmsprop"

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the transform from gradients to directions, without the learning rate.

        Args:
          momentum: momentum from a schedule, []; None for the field.
        """
        factor = self.momentum if momentum is None else momentum
        rms = optax.scale_by_rms(self.alpha, self.eps, eps_in_sqrt=False)
        stddev = optax.scale_by_stddev(self.alpha, self.eps, eps_in_sqrt=False)

        def init(params: Tree) -> RMSpropState:
            mu = zeros_like(params) if self.centered else None
            return RMSpropState(
                zeros_like(params), mu, None if _is_disabled(factor) else zeros_like(params)
            )

        def update(
            gradients: Tree, state: RMSpropState, params: Tree | None = None
        ) -> tuple[Tree, RMSpropState]:
            gradients = add_decay(self, gradients, params)
            if self.centered:
                moments = optax.ScaleByRStdDevState(mu=state.mu, nu=state.nu)
                updates, moments = stddev.update(gradients, moments)
                state = state._replace(mu=moments.mu, nu=moments.nu)
            else:
                updates, moments = rms.update(gradients, optax.ScaleByRmsState(state.nu))
                state = state._replace(nu=moments.nu)
            if _is_disabled(factor):
                return updates, state
            updates = _add_momentum(updates, state.buffer, factor)
            return updates, state._replace(buffer=updates)

        return optax.GradientTransformation(init, update)


Optimizer = SGD | Adam | AdamW | RMSprop | NAdam | RAdam | Adagrad | Lion | Optax
"""Optimizers that a recipe can hold."""

if TYPE_CHECKING:
    Rule: TypeAlias = Optimizer | optax.GradientTransformation
    """One of jaxft's optimizers, or any optax transform that leaves out the learning rate
    (`optax.scale_by_lion()`, not `optax.lion(1e-4)`)."""
else:
    Rule = Optimizer  # a saved recipe holds no optax transform: YAML has no functions


def _adam(rule: Adam | AdamW, momentum: jax.Array | None) -> optax.GradientTransformation:
    b1: Any = rule.b1 if momentum is None else momentum
    return (_amsgrad if rule.amsgrad else optax.scale_by_adam)(b1, rule.b2, rule.eps)


def _amsgrad(b1: Any, b2: float, eps: float) -> optax.GradientTransformation:
    """As torch; `optax.scale_by_amsgrad` takes the maximum after the bias correction."""

    def init(params: Tree) -> AMSGradState:
        count = jnp.zeros([], jnp.int32)
        return AMSGradState(count, zeros_like(params), zeros_like(params), zeros_like(params))

    def update(
        gradients: Tree, state: AMSGradState, params: Tree | None = None
    ) -> tuple[Tree, AMSGradState]:
        count = state.steps + 1
        mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, gradients, state.mu)
        nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, gradients, state.nu)
        nu_max = jax.tree.map(jnp.maximum, nu, state.nu_max)
        correction1, correction2 = 1 - b1**count, jnp.sqrt(1 - b2**count)
        updates = jax.tree.map(
            lambda g, m, v: (m / correction1 / (jnp.sqrt(v) / correction2 + eps)).astype(g.dtype),
            gradients,
            mu,
            nu_max,
        )
        return updates, AMSGradState(count, mu, nu, nu_max)

    return optax.GradientTransformation(init, update)


def _add_momentum(updates: Tree, buffer: Tree, factor: float | jax.Array) -> Tree:
    return jax.tree.map(lambda u, b: u + factor * b, updates, buffer)


def _is_disabled(momentum: float | jax.Array) -> bool:
    """Returns True without momentum; a scheduled momentum counts as enabled even at 0."""
    return not isinstance(momentum, jax.Array) and momentum == 0
