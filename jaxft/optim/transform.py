"""One optax transform for all groups: an optimizer, a learning rate and a schedule per group."""

import reprlib
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.errors import LabelError
from jaxft.labels import FROZEN, Tree, leaf_labels, partition, same_structure
from jaxft.optim.optimizers import Rule
from jaxft.optim.plateau import PlateauState, ReduceLROnPlateau
from jaxft.optim.schedules import ClosedForm


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
