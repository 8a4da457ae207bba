"""The optimizer of a stage: one transform per group, joined by `multi_transform`.

A group's transform applies its optimizer, its learning rate and its schedule.
"""

import reprlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.errors import LabelError, RecipeError
from jaxft.labels import FROZEN, Tree, combine, filled, labels_like, partition
from jaxft.optim.complete_optimizer import WAY_OUT, is_complete
from jaxft.optim.group_trees import GroupTrees
from jaxft.optim.optax_rule import Optax
from jaxft.optim.optimizers import Rule
from jaxft.optim.plateau import PlateauState, ReduceLROnPlateau
from jaxft.optim.schedule_base import Span
from jaxft.optim.schedules import ClosedForm
from jaxft.tree_paths import is_none


class GroupState(NamedTuple):
    """Optimizer state of one group.

    `carry` takes over `rule`; the other fields start with the stage.
    """

    rule: optax.OptState
    """State of the optimizer: moments and their count."""
    position: jax.Array
    """Steps since the start of the stage, int32 []."""
    plateau: PlateauState | None
    """State of a ReduceLROnPlateau schedule; None for other schedules."""
    factors: Tree = None
    """Factor of each tensor's learning rate, [] each, for relative learning rates; else None."""


class LeafwiseTransform(optax.GradientTransformation):
    """A transform that treats each array by itself, wherever in the tree it is."""


def group_transform(
    rule: Rule,
    lr: float,
    schedule: ClosedForm | ReduceLROnPlateau,
    span: Span,
    *,
    relative: bool = False,
) -> optax.GradientTransformation:
    """Returns the transform of one group, with a `GroupState`.

    Its update is the optimizer's direction times minus the scheduled learning rate. A complete
    optimizer, an `Optax` with `takes_lr`, receives the scheduled learning rate instead: not every
    optimizer is linear in it.

    Args:
      rule: optimizer of the group.
      lr: base learning rate.
      schedule: changes the learning rate within the span.
      span: steps that the schedule covers.
      relative: whether each tensor's learning rate is also multiplied by its entry of
        `GroupState.factors`, which is 1 until `restart` sets it.

    Raises:
      RecipeError: from `init`: the optimizer includes a learning rate.
    """
    takes_lr = isinstance(rule, Optax) and rule.takes_lr

    def optimizer(position: jax.Array | int, scheduled_lr: jax.Array) -> Any:
        if isinstance(rule, optax.GradientTransformation):
            return rule
        if isinstance(rule, Optax):
            return rule.at_lr(scheduled_lr) if takes_lr else rule.direction()
        if isinstance(schedule, ReduceLROnPlateau):
            return rule.direction()
        return rule.direction(schedule.momentum(*span.time(schedule.by, position)))

    def init(params: Tree) -> GroupState:
        is_unknown = isinstance(rule, optax.GradientTransformation) and is_complete(rule) is None
        if is_unknown and is_complete(rule, params):  # it needs the structure of these parameters
            raise RecipeError(f"the optimizer of a stage {WAY_OUT}")
        plateau = schedule.start() if isinstance(schedule, ReduceLROnPlateau) else None
        state = GroupState(
            rule=None,
            position=jnp.zeros([], jnp.int32),
            plateau=plateau and plateau.as_arrays(),
            factors=jax.tree.map(lambda _: jnp.ones([]), params) if relative else None,
        )
        first = optimizer(0, group_lr(lr, schedule, state, span))
        return state._replace(rule=first.init(params))

    def update(
        gradients: Tree, state: GroupState, params: Tree | None = None
    ) -> tuple[Tree, GroupState]:
        scheduled_lr = group_lr(lr, schedule, state, span)
        updates, moments = optimizer(state.position, scheduled_lr).update(
            gradients, state.rule, params
        )
        # A scheduled momentum or learning rate may be of a wider type than the moments.
        moments = _with_dtypes_of(state.rule, moments)
        if takes_lr:
            updates = _with_dtypes_of(gradients, updates)
        elif relative:
            updates = jax.tree.map(
                lambda u, factor: -(scheduled_lr * factor).astype(u.dtype) * u,
                updates,
                state.factors,
            )
        else:
            # Computed once, because thousands of small operations take long to compile.
            dtypes = dict.fromkeys(u.dtype for u in jax.tree.leaves(updates))
            factor_of = {dtype: -scheduled_lr.astype(dtype) for dtype in dtypes}
            updates = jax.tree.map(lambda u: factor_of[u.dtype] * u, updates)
        return updates, state._replace(rule=moments, position=state.position + 1)

    # A transform of optax may have a mask in the structure of the parameters; jaxft's have none.
    is_foreign = isinstance(rule, optax.GradientTransformation | Optax)
    return (optax.GradientTransformation if is_foreign else LeafwiseTransform)(init, update)


def _with_dtypes_of(old: Tree, new: Tree) -> Tree:
    return jax.tree.map(lambda x, y: y if x.dtype == y.dtype else y.astype(x.dtype), old, new)


def group_lr(
    lr: float, schedule: ClosedForm | ReduceLROnPlateau, state: GroupState, span: Span
) -> jax.Array:
    """Returns the learning rate of a group's next step, []. Arguments as `group_transform`."""
    if isinstance(schedule, ReduceLROnPlateau):
        assert state.plateau is not None
        return schedule.lr_at(lr, state.plateau)
    return schedule.lr_at(lr, *span.time(schedule.by, state.position))


def pass_step(opt_state: optax.OptState) -> optax.OptState:
    """Returns the state after a skipped step: schedules advance, moments do not."""
    return jax.tree.map(
        lambda x: x._replace(position=x.position + 1) if isinstance(x, GroupState) else x,
        opt_state,
        is_leaf=lambda x: isinstance(x, GroupState),
    )


def restart(opt_state: optax.OptState, fresh: optax.OptState, factors: Tree) -> optax.OptState:
    """Resets the optimizer of every group and sets the factors of its learning rates.

    Schedules continue.

    Args:
      opt_state: state of a `StagePlan.transform` with relative learning rates.
      fresh: initial state of the same transform.
      factors: factor of each tensor, [] each, in the structure of the parameters.

    Returns:
      `opt_state` with the moments of `fresh` and the new factors.
    """
    states = dict(opt_state.inner_states)
    for group, state in states.items():
        if group == FROZEN:  # holds parked states, which stay
            continue
        fresh_state = fresh.inner_states[group].inner_state
        group_factors = jax.tree.map(
            lambda old, new: old if _is_masked(old) else jnp.asarray(new, old.dtype),
            fresh_state.factors,
            factors,
            is_leaf=_is_masked,
        )
        restarted = state.inner_state._replace(rule=fresh_state.rule, factors=group_factors)
        states[group] = state._replace(inner_state=restarted)
    return opt_state._replace(inner_states=states)


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def multi_transform(
    transforms: Mapping[str, optax.GradientTransformation], labels: Tree
) -> optax.GradientTransformationExtraArgs:
    """`optax.multi_transform` that freezes the label `frozen` and checks labels and transforms.

    Its `init` and `update` accept all parameters and the trainable half (None where frozen), in any
    combination. Updates are zero for frozen parameters, or None where gradients and parameters both
    are. Wrappers with arrays of their own, such as `optax.MultiSteps`, need the same tree in both;
    see `trainable_only`.

    Args:
      transforms: a transform for each label except `frozen`.
      labels: the label tree.

    Raises:
      LabelError: a label has no transform, or a transform no label; from `init` and `update`: the
        labels do not fit the tree, see `jaxft.labels.labels_like`.

    Example:
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
        raise LabelError(
            f"{FROZEN!r} is reserved for parameters that do not train. Rename the label."
        )
    if missing or unused:
        sides = {"labels without a transform": missing, "transforms without a label": unused}
        errors = [f"{side} {names}" for side, names in sides.items() if names]
        raise LabelError(f"{'; '.join(errors)}. Every label but {FROZEN!r} takes one transform.")
    # Transforms of optax may have masks in the structure of the parameters; jaxft's have none.
    compact = [label for label, tx in transforms.items() if isinstance(tx, LeafwiseTransform)]
    inner = {label: optax.with_extra_args_support(tx) for label, tx in transforms.items()}
    own_trees = GroupTrees(labels_like(labels, labels), inner, compact)

    def trees_of(tree: Tree) -> GroupTrees:
        """Checks the tree. An NNX optimizer updates other containers than it initialises."""
        fitting = labels_like(tree, labels)
        is_own = jax.tree.structure(tree, is_leaf=is_none) == own_structure
        return own_trees if is_own else GroupTrees(fitting, inner, compact)

    own_structure: Any = jax.tree.structure(labels, is_leaf=is_none)

    def init(params: Tree) -> optax.PartitionState:
        trees = trees_of(params).divide(params)
        states = {label: inner[label].init(tree) for label, tree in trees.items()}
        states[FROZEN] = optax.EmptyState()
        return optax.PartitionState(
            {label: optax.MaskedState(state) for label, state in states.items()}
        )

    def update(
        gradients: Tree,
        state: optax.PartitionState,
        params: Tree | None = None,
        **extra_args: Any,
    ) -> tuple[Tree, optax.PartitionState]:
        trees = trees_of(gradients)
        params_of = dict.fromkeys(inner) if params is None else trees.divide(params)
        states = dict(state.inner_states)  # parked states stay with the frozen label
        updates = {}
        for label, group_gradients in trees.divide(gradients).items():
            updates[label], group_state = inner[label].update(
                group_gradients, states[label].inner_state, params_of[label], **extra_args
            )
            states[label] = optax.MaskedState(group_state)
        others = (gradients,) if params is None else (gradients, params)
        return trees.join(updates, *others), optax.PartitionState(states)

    return optax.GradientTransformationExtraArgs(init, update)


def trainable_only(
    transform: optax.GradientTransformation | optax.MultiSteps, labels: Tree
) -> optax.GradientTransformationExtraArgs:
    """Returns a transform that passes only the trainable half to another one.

    Its `init` and `update` accept all parameters and the trainable half (None where frozen), in any
    combination. Use it around wrappers that store arrays of all parameters that they see, such as
    `optax.MultiSteps`: then they store none for frozen parameters. Adds nothing to the state.

    Args:
      transform: an optax transform, usually a wrapper around a `multi_transform`.
      labels: the label tree.

    Raises:
      LabelError: from `init` and `update`: the parameters have another structure than the labels.

    Example:
      >>> labels = {"body": "frozen", "head": "head"}
      >>> tx = multi_transform({"head": optax.sgd(0.5)}, labels)
      >>> tx = trainable_only(optax.MultiSteps(tx, every_k_schedule=2), labels)
      >>> state = tx.init({"body": jnp.ones(()), "head": jnp.ones(())})
      >>> state.acc_grads
      {'body': None, 'head': Array(0., dtype=float32)}
      >>> for _ in range(2):
      ...     updates, state = tx.update({"body": None, "head": jnp.ones(())}, state)
      >>> updates
      {'body': None, 'head': Array(-0.5, dtype=float32)}
    """
    if isinstance(transform, optax.GradientTransformation):
        transform = optax.with_extra_args_support(transform)

    def init(params: Tree) -> optax.OptState:
        return transform.init(partition(params, labels)[0])

    def update(
        gradients: Tree, state: optax.OptState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, optax.OptState]:
        half, frozen = partition(gradients, labels)
        if params is not None:
            params, frozen_params = partition(params, labels)
            frozen = filled(frozen, frozen_params)
        updates, state = transform.update(half, state, params, **extra_args)
        return combine(updates, jax.tree.map(jnp.zeros_like, frozen)), state

    return optax.GradientTransformationExtraArgs(init, update)
