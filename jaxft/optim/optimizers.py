"""Optimizers as torch defines them, each group at a rate of its own, as one multi_transform."""

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxft.dataclass_checks import checked
from jaxft.errors import LabelError
from jaxft.labels import FROZEN, Tree, leaf_labels, partition, same_structure
from jaxft.optim.plateau import PlateauState, ReduceLROnPlateau
from jaxft.optim.schedules import Checked, ClosedForm


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


_RATE = "rates belong to the stages, Stage(..., train={'fc': 1e-3})"
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


class GroupState(NamedTuple):
    """The state of one group: what a next stage may carry on, and what begins with the stage."""

    rule: optax.OptState
    """Moments and their count."""
    position: jax.Array
    """Steps since the stage's start, int32."""
    plateau: PlateauState | None
    """Of a ReduceLROnPlateau only."""
    factors: Tree = None
    """Of each tensor's rate, scalars; where rates are relative only."""


def group_transform(
    rule: Rule,
    lr: float,
    schedule: ClosedForm | ReduceLROnPlateau,
    *,
    steps: int,
    steps_per_epoch: int,
    relative: bool = False,
) -> optax.GradientTransformation:
    """One group's transform: `rule`'s direction times minus the rate that `schedule` gives.

    `steps` is the stage's length, `steps_per_epoch` turns it into epochs for schedules by epoch.
    If `relative`, each tensor's rate is also times its factor, which is 1 until `restart` sets it.

    Rule and schedule keep states of their own, so that `carry` can take the one and leave the
    other: a schedule starts with its stage.
    """

    length = {"steps": steps, "steps_per_epoch": steps_per_epoch}

    def direction(position: jax.Array | int) -> optax.GradientTransformation:
        if isinstance(rule, optax.GradientTransformation):
            return rule
        if isinstance(schedule, ReduceLROnPlateau):
            return rule.direction()
        return rule.direction(schedule.momentum(*_time(schedule, position, **length)))

    def init(params: Tree) -> GroupState:
        plateau = schedule.start() if isinstance(schedule, ReduceLROnPlateau) else None
        return GroupState(
            rule=direction(0).init(params),
            position=jnp.zeros([], jnp.int32),
            plateau=plateau and plateau.as_arrays(),
            factors=jax.tree.map(lambda _: jnp.ones([]), params) if relative else None,
        )

    def update(
        gradients: Tree, state: GroupState, params: Tree | None = None
    ) -> tuple[Tree, GroupState]:
        updates, moments = direction(state.position).update(gradients, state.rule, params)
        # A momentum that a schedule computes, as a wider array, must not widen them.
        moments = jax.tree.map(lambda new, old: new.astype(old.dtype), moments, state.rule)
        rate = group_rate(lr, schedule, state, **length)
        factors = state.factors if relative else jax.tree.map(lambda _: 1.0, updates)
        updates = jax.tree.map(lambda u, f: -(rate * f).astype(u.dtype) * u, updates, factors)
        return updates, state._replace(rule=moments, position=state.position + 1)

    return optax.GradientTransformation(init, update)


def group_rate(
    lr: float,
    schedule: ClosedForm | ReduceLROnPlateau,
    state: GroupState,
    *,
    steps: int,
    steps_per_epoch: int,
) -> jax.Array:
    """The learning rate of a group's next step."""
    if isinstance(schedule, ReduceLROnPlateau):
        assert state.plateau is not None
        return schedule.rate(lr, state.plateau)
    time = _time(schedule, state.position, steps, steps_per_epoch)
    return schedule.rate(lr, *time)


def _time(
    schedule: ClosedForm, position: jax.Array | int, steps: int, steps_per_epoch: int
) -> tuple[jax.Array | int, int]:
    """A position and the stage's length in the schedule's unit."""
    if schedule.by == "epoch":
        return position // steps_per_epoch, -(-steps // steps_per_epoch)
    return position, steps


def pass_step(opt_state: optax.OptState) -> optax.OptState:
    """The state after a step that was not taken: moments stay, schedules go on."""
    return jax.tree.map(
        lambda x: x._replace(position=x.position + 1) if isinstance(x, GroupState) else x,
        opt_state,
        is_leaf=lambda x: isinstance(x, GroupState),
    )


def restart(opt_state: optax.OptState, fresh: optax.OptState, factors: Tree) -> optax.OptState:
    """The state with every rule as in `fresh` and rates of these factors; schedules go on.

    Both states are a `StagePlan.transform`'s with relative rates. `factors` are scalars in the
    structure of the parameters.
    """
    states = dict(opt_state.inner_states)
    for group, state in states.items():
        if group == FROZEN:  # what is parked there stays
            continue
        new = fresh.inner_states[group].inner_state
        own = jax.tree.map(
            lambda one, f: one if isinstance(one, optax.MaskedNode) else jnp.asarray(f, one.dtype),
            new.factors,
            factors,
            is_leaf=lambda node: isinstance(node, optax.MaskedNode),
        )
        inner = state.inner_state._replace(rule=new.rule, factors=own)
        states[group] = state._replace(inner_state=inner)
    return opt_state._replace(inner_states=states)


def multi_transform(
    transforms: Mapping[str, optax.GradientTransformation], labels: Tree
) -> optax.GradientTransformationExtraArgs:
    """`optax.multi_transform` that freezes what is labelled `frozen` and checks both sides.

    Initialise and update it with everything, or with the trainable half (`None` where frozen).

    Raises:
      LabelError: a label without a transform, or a transform without a label; and from `init`,
        parameters of another structure than the labels.

    >>> labels = {"body": "frozen", "head": "head"}
    >>> tx = multi_transform({"head": optax.sgd(0.5)}, labels)
    >>> params = {"body": jnp.ones(()), "head": jnp.ones(())}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> {name: float(update) for name, update in updates.items()}
    {'body': 0.0, 'head': -0.5}
    """
    leaves = jax.tree.leaves(labels)
    if wrong := [label for label in leaves if type(label) is not str]:
        raise LabelError(f"labels must be strings, not {reprlib.repr(wrong[0])}.")
    used = dict.fromkeys(leaves)
    missing = [label for label in used if label != FROZEN and label not in transforms]
    unused = [label for label in transforms if label not in used]
    if FROZEN in transforms:
        raise LabelError(f"{FROZEN!r} is reserved: what it labels does not train. Rename it.")
    if missing or unused:
        sides = {"labels without a transform": missing, "transforms without a label": unused}
        wrong = [f"{what} {names}" for what, names in sides.items() if names]
        raise LabelError(f"{'; '.join(wrong)}. Every label but {FROZEN!r} takes one transform.")
    # A label tree can be callable (a module of strings), and optax would call it.
    whole = optax.multi_transform({**transforms, FROZEN: optax.set_to_zero()}, lambda _: labels)

    half, _ = partition(labels, labels)

    def init(params: Tree) -> optax.OptState:
        leaf_labels(params, half if same_structure(params, half) else labels)
        return whole.init(params)

    return optax.GradientTransformationExtraArgs(init, whole.update)


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
