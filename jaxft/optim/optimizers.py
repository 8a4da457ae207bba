"""SGD, Adam, AdamW and RMSprop as torch defines them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxft.dataclass_checks import checked
from jaxft.labels import Tree
from jaxft.optim.schedules import Checked


class SGDState(NamedTuple):
    """The state of `SGD`, empty without momentum.

    The layout is the same for all hyperparameters: `carry` matches states field by field, and a
    rule passes on, unchanged, the fields that it does not use.
    """

    buffer: Tree | None = None
    """Momentum buffers; zeros before the first gradient."""
    started: jax.Array | None = None
    """Whether `buffer` holds a gradient yet, bool: torch does not dampen the first one."""


class RMSpropState(NamedTuple):
    """The state of `RMSprop`; `mu` is None unless centered, `buffer` without momentum."""

    nu: Tree
    """Averages of the squared gradients."""
    mu: Tree | None
    """Averages of the gradients."""
    buffer: Tree | None
    """Momentum buffers."""


_RATE = "learning rates belong to the stages, Stage(..., train={'fc': 1e-3})"
_DECAY = "it is called weight_decay"
# Arguments of torch's, Keras' and optax's optimizers, and what to write here.
_OF_OTHERS = {
    "params": "what trains is for the stages to say, Stage(..., train={'fc': 1e-3})",
    "lr": _RATE,
    "learning_rate": _RATE,
    "betas": "write b1=0.9, b2=0.999",
    "beta1": "it is called b1",
    "beta_1": "it is called b1",
    "beta2": "it is called b2",
    "beta_2": "it is called b2",
    "epsilon": "it is called eps",
    "decay": _DECAY,
    "wd": _DECAY,
    "l2": _DECAY,
    "weight_decay_rate": _DECAY,
    "rho": "RMSprop's average of squares is called alpha",
    "clipnorm": "it is a field of the stage, Stage(..., clip_norm=1.0)",
    "global_clipnorm": "it is a field of the stage, Stage(..., clip_norm=1.0)",
    "use_ema": "it is a field of the stage, Stage(..., ema=0.999)",
    "mask": "decay_vectors=False spares biases and norms",
    "amsgrad": "it is not among jaxft's; optimizer=optax.scale_by_amsgrad() serves in jaxft.plan",
}


@checked(**_OF_OTHERS)
@dataclass(frozen=True, kw_only=True)
class SGD(Checked):
    """`torch.optim.SGD`: decay joins the gradient, the rate stays outside the momentum buffer.

    With `decay_vectors=False` (here and below) the decay spares one-dimensional parameters:
    biases, and the scales of norm layers.
    """

    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    decay_vectors: bool = True
    rule: Literal["sgd"] = "sgd"

    @classmethod
    def wrong_values(cls, values: Mapping[str, Any]) -> list[str]:
        """Returns a complaint for each value that torch refuses too."""
        wrong = super().wrong_values(values)
        if values.get("nesterov") and (not values.get("momentum") or values.get("dampening")):
            wrong.append("nesterov needs a momentum and no dampening")
        return wrong

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the update before the rate is applied; `momentum` replaces the field."""
        factor = self.momentum if momentum is None else momentum

        def init(params: Tree) -> SGDState:
            if _is_off(factor):
                return SGDState()
            return SGDState(_zeros(params), jnp.zeros([], bool))

        def update(
            gradients: Tree, state: SGDState, params: Tree | None = None
        ) -> tuple[Tree, SGDState]:
            gradients = _decay(self, gradients, params)
            if _is_off(factor):
                return gradients, state
            assert state.started is not None
            new = gradients
            if self.dampening:
                share = jnp.where(state.started, 1 - self.dampening, 1.0)
                new = jax.tree.map(lambda g: share.astype(g.dtype) * g, gradients)
            buffer = _accumulate(new, state.buffer, factor)
            updates = _accumulate(gradients, buffer, factor) if self.nesterov else buffer
            # An array that no step reads is not donated.
            return updates, SGDState(buffer, state.started | True)

        return optax.GradientTransformation(init, update)


@checked(**_OF_OTHERS)
@dataclass(frozen=True, kw_only=True)
class Adam(Checked):
    """`torch.optim.Adam`: decay is added to the gradient before the moments."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    decay_vectors: bool = True
    rule: Literal["adam"] = "adam"

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the update before the rate is applied; `momentum` replaces b1."""
        adam = _adam(self, momentum)

        def update(
            gradients: Tree, state: optax.OptState, params: Tree | None = None
        ) -> tuple[Tree, optax.OptState]:
            updates, state = adam.update(_decay(self, gradients, params), state)
            return updates, state

        return optax.GradientTransformation(adam.init, update)


@checked(**_OF_OTHERS)
@dataclass(frozen=True, kw_only=True)
class AdamW(Checked):
    """`torch.optim.AdamW`: decay acts on the parameters alone, times the rate (default 1e-2)."""

    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-2
    decay_vectors: bool = True
    rule: Literal["adamw"] = "adamw"

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the update before the rate is applied; `momentum` replaces b1."""
        adam = _adam(self, momentum)

        def update(
            gradients: Tree, state: optax.OptState, params: Tree | None = None
        ) -> tuple[Tree, optax.OptState]:
            updates, state = adam.update(gradients, state)
            return _decay(self, updates, params), state

        return optax.GradientTransformation(adam.init, update)


@checked(**_OF_OTHERS)
@dataclass(frozen=True, kw_only=True)
class RMSprop(Checked):
    """`torch.optim.RMSprop`: alpha averages the squares; eps and the rate as torch places them."""

    alpha: float = 0.99
    eps: float = 1e-8
    momentum: float = 0.0
    centered: bool = False
    weight_decay: float = 0.0
    decay_vectors: bool = True
    rule: Literal["rmsprop"] = "rmsprop"

    def direction(self, momentum: jax.Array | None = None) -> optax.GradientTransformation:
        """Returns the update before the rate is applied; `momentum` replaces the field."""
        factor = self.momentum if momentum is None else momentum
        rms = optax.scale_by_rms(self.alpha, self.eps, eps_in_sqrt=False)
        stddev = optax.scale_by_stddev(self.alpha, self.eps, eps_in_sqrt=False)

        def init(params: Tree) -> RMSpropState:
            mu = _zeros(params) if self.centered else None
            return RMSpropState(_zeros(params), mu, None if _is_off(factor) else _zeros(params))

        def update(
            gradients: Tree, state: RMSpropState, params: Tree | None = None
        ) -> tuple[Tree, RMSpropState]:
            gradients = _decay(self, gradients, params)
            if self.centered:
                moments = optax.ScaleByRStdDevState(mu=state.mu, nu=state.nu)
                updates, moments = stddev.update(gradients, moments)
                state = state._replace(mu=moments.mu, nu=moments.nu)
            else:
                updates, moments = rms.update(gradients, optax.ScaleByRmsState(state.nu))
                state = state._replace(nu=moments.nu)
            if _is_off(factor):
                return updates, state
            updates = _accumulate(updates, state.buffer, factor)
            return updates, state._replace(buffer=updates)

        return optax.GradientTransformation(init, update)


Optimizer = SGD | Adam | AdamW | RMSprop
"""The optimizers that a recipe can name."""

if TYPE_CHECKING:
    Rule: TypeAlias = Optimizer | optax.GradientTransformation
    """One of ours, or any optax transform that gives the update before the rate is applied
    (`optax.scale_by_lion()`, not `optax.lion(1e-4)`)."""
else:
    Rule = Optimizer  # all that a saved recipe can hold: there is no YAML for functions


def _decay(rule: Optimizer, updates: Tree, params: Tree | None) -> Tree:
    """Adds the rule's weight_decay times the parameters to the updates."""
    if not rule.weight_decay:
        return updates
    return jax.tree.map(
        lambda u, p: u + rule.weight_decay * p if rule.decay_vectors or jnp.ndim(p) > 1 else u,
        updates,
        params,
    )


def _adam(rule: Adam | AdamW, momentum: jax.Array | None) -> optax.GradientTransformation:
    b1: Any = rule.b1 if momentum is None else momentum
    return optax.scale_by_adam(b1, rule.b2, rule.eps)


def _accumulate(new: Tree, buffer: Tree, factor: float | jax.Array) -> Tree:
    return jax.tree.map(lambda n, b: n + factor * b, new, buffer)


def _zeros(params: Tree) -> Tree:
    return jax.tree.map(jnp.zeros_like, params)


def _is_off(momentum: float | jax.Array) -> bool:
    """Whether there is no momentum; one that a schedule sets counts as on, also where it is 0."""
    return not isinstance(momentum, jax.Array) and momentum == 0
