"""Carries optimizer state over to new labels, matching parameters by path instead of position.

Throughout this file, the *memory* of a state is the part that is carried: moments and their count.
"""

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np
import optax

from jaxft.errors import LabelError
from jaxft.labels import FROZEN
from jaxft.optim.optimizers import RMSpropState, SGDState
from jaxft.optim.transform import GroupState

Leaves = dict[str, Any]
"""Leaves of a memory by key path; a `MaskedNode` at the parameters of other groups."""

# The field of each wrapper state that is carried; None carries nothing. All other fields start
# with the stage: positions of schedules, hyperparameters, accumulated gradients, counts of skipped
# steps.
_CARRIED_FIELD = {
    GroupState: "rule",
    optax.MaskedState: "inner_state",
    optax.InjectHyperparamsState: "inner_state",
    optax.InjectStatefulHyperparamsState: "inner_state",
    optax.MultiStepsState: "inner_opt_state",
    optax.ApplyIfFiniteState: "inner_state",
    optax.ConditionallyTransformState: "inner_state",
    optax.ConditionallyMaskState: "inner_state",
    optax.LookaheadState: "fast_state",
    optax.ScaleByScheduleState: None,
    optax.contrib.ReduceLROnPlateauState: None,
    optax.AddNoiseState: None,
}


def carry(
    old: optax.OptState, new: optax.OptState, *, park: Collection[str] = ()
) -> optax.OptState:
    """Copies optimizer state of the previous labels into a fresh state of the new labels.

    Works like torch's `add_param_group`: parameters that keep training keep their moments and step
    count, new ones start fresh. Groups may be renamed, split or merged, and hyperparameters may
    change. A group starts fresh, with a warning, if its optimizer changed (Adam and AdamW count as
    the same) or if it mixes parameters with different step counts (`jaxft.plan` never does).

    Only moments and their count are carried. Hyperparameters, positions of schedules and
    accumulated gradients are those in `new`, for jaxft's transforms and for optax's.

    The `multi_transform` may be wrapped (`optax.chain`, `MultiSteps`, `apply_if_finite`,
    `inject_hyperparams`, ...) and may contain wrappers. Moments outside of it, and gradients that a
    `MultiSteps` has accumulated for its next step, are dropped with a warning.

    Args:
      old: state of a `multi_transform` over the previous labels.
      new: initial state of a `multi_transform` over the new labels.
      park: labels whose state is kept while they do not train, for a later `carry`. It is stored
        with the frozen label. Other unused state is dropped.

    Returns:
      A state with the structure of `new`, apart from parked state.

    Raises:
      LabelError: a state contains no `multi_transform`, or the states contain different numbers of
        them.

    Example:
      >>> import jax.numpy as jnp, jaxft
      >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
      >>> def relabel(*names):
      ...     labels = jaxft.label(params, {name: name for name in names})
      ...     return jaxft.multi_transform({name: optax.adam(0.1) for name in names}, labels)
      >>> first, second = relabel("head"), relabel("head", "body")
      >>> _, state = first.update(params, first.init(params), params)
      >>> state = carry(state, second.init(params))
      >>> [int(state.inner_states[name].inner_state[0].count) for name in ("head", "body")]
      [1, 0]
    """
    state, messages = carry_with_warnings(old, new, park=park)
    for message in messages:
        warnings.warn(message, stacklevel=2)
    return state


def carry_with_warnings(
    old: optax.OptState, new: optax.OptState, *, park: Collection[str] = ()
) -> tuple[optax.OptState, list[str]]:
    """Returns the state that `carry` returns, and its warnings as sentences."""
    old_partitions, new_partitions = _partitions(old, "old"), _partitions(new, "new")
    if len(old_partitions) != len(new_partitions):
        raise LabelError(
            f"carry: the old state holds {len(old_partitions)} multi_transforms and the new one "
            f"{len(new_partitions)}. Build the transforms of both stages alike, or carry each "
            "multi_transform separately."
        )
    messages = [*_dropped_moments(old), *_dropped_gradients(old)]
    states = []
    for old_partition, new_partition in zip(old_partitions, new_partitions, strict=True):
        state, partition_messages = _carry_partition(old_partition, new_partition, park)
        states.append(state)
        messages += partition_messages
    carried = iter(states)
    state = jax.tree.map(
        lambda node: next(carried) if _is_partition(node) else node, new, is_leaf=_is_partition
    )
    return state, messages


def _carry_partition(
    old: optax.PartitionState, new: optax.PartitionState, park: Collection[str]
) -> tuple[optax.PartitionState, list[str]]:
    old_memories = {group: _memory(state) for group, state in old.inner_states.items()}
    parked = old_memories.pop(FROZEN, None)
    old_memories |= parked if isinstance(parked, dict) else {}
    states = dict(new.inner_states)
    new_memories = {group: _memory(state) for group, state in states.items() if group != FROZEN}
    leaves_by_group = [_leaves(m) for m in (*old_memories.values(), *new_memories.values())]
    masked = {path for leaves in leaves_by_group for path, x in leaves.items() if _is_masked(x)}
    messages, changed_groups = [], []
    for group, fresh in new_memories.items():
        same_optimizer = {
            name: memory for name, memory in old_memories.items() if _kind(memory) == _kind(fresh)
        }
        sources = {name: _leaves(memory) for name, memory in same_optimizer.items()}
        carried, message = _carry_leaves(group, _leaves(fresh), sources, masked)
        if message:
            messages.append(message)
        elif not carried and group not in sources and jax.tree.leaves(old_memories.get(group)):
            changed_groups.append(group)
        memory = _replace_leaves(fresh, carried)
        if group in same_optimizer:
            memory = _with_unused_fields(memory, same_optimizer[group])
        states[group] = _with_memory(states[group], memory)
    if changed_groups:
        messages.append(_changed_optimizer_message(changed_groups))
    if kept := {g: old_memories[g] for g in old_memories if g in set(park) - set(new_memories)}:
        if FROZEN not in states:
            raise LabelError(
                f"carry: {', '.join(kept)} cannot be parked, as nothing is labelled {FROZEN!r}. "
                "Build the transform with jaxft.multi_transform."
            )
        states[FROZEN] = states[FROZEN]._replace(inner_state=kept)
    return new._replace(inner_states=states), messages


def _changed_optimizer_message(groups: list[str]) -> str:
    names = ", ".join(map(repr, groups))
    if len(groups) == 1:
        return f"group {names} has another optimizer now: it starts fresh."
    return f"groups {names} have another optimizer now: they start fresh."


def _carry_leaves(
    group: str, fresh: Leaves, sources: Mapping[str, Leaves], masked: Collection[str]
) -> tuple[Leaves, str]:
    """Finds old values for the leaves of a group.

    Args:
      group: name of the group.
      fresh: leaves of its fresh memory.
      sources: leaves of the old memories of the same optimizer, by group.
      masked: paths that are masked in any group, i.e. belong to a single parameter.

    Returns:
      `(leaves, message)`: old values by path, and a warning if the group must start fresh.
    """
    wanted = {path: leaf for path, leaf in fresh.items() if not _is_masked(leaf)}
    # Leaves that are masked elsewhere, and arrays, belong to one parameter; the others, such as
    # Adam's count, to the whole group.
    param_paths = [path for path in wanted if path in masked or np.ndim(wanted[path])]
    if not param_paths:  # a count alone shows no parameters, so the group's name decides
        return {path: sources[group][path] for path in wanted} if group in sources else {}, ""
    source_of = {
        path: name
        for path in param_paths
        for name, leaves in sources.items()
        if _same_shape(leaves.get(path), wanted[path])
    }
    if not source_of:
        return {}, ""
    donors = [sources[name] for name in dict.fromkeys(source_of.values())]
    shared_paths = [path for path in wanted if path not in param_paths]
    counts = [[donor[path] for path in shared_paths] for donor in donors]
    has_newcomers = len(source_of) < len(param_paths)
    counts_differ = any(not _equal(counts[0], other) for other in counts[1:])
    if shared_paths and (has_newcomers or counts_differ):
        return {}, (
            f"group {group!r} mixes parameters that have trained for different numbers of steps: "
            "it starts fresh. Give them different labels, as jaxft.plan does."
        )
    shared = dict(zip(shared_paths, counts[0], strict=True))
    return shared | {path: sources[name][path] for path, name in source_of.items()}, ""


def _replace_leaves(memory: Any, leaves: Leaves) -> Any:
    """Returns the memory with the given leaves replaced."""
    parts = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaves.get(jax.tree_util.keystr(path), leaf),
        _parts(memory),
        is_leaf=_is_masked,
    )
    remaining = iter(parts)

    def put(node: Any) -> Any:
        if type(node) is tuple:
            return tuple(map(put, node))
        return next(remaining) if _parts(node) else node

    return put(memory)


def _parts(memory: Any) -> list[Any]:
    """Returns the states with arrays of a possibly nested chain, in order.

    States without arrays depend on hyperparameters, so they must not count: optax's Adam has one
    for its decay, and different ones for a schedule and for a constant learning rate.
    """
    if type(memory) is tuple:
        return [part for node in memory for part in _parts(node)]
    is_jaxft_state = isinstance(memory, SGDState | RMSpropState)
    return [memory] if is_jaxft_state or jax.tree.leaves(memory, is_leaf=_is_masked) else []


def _with_unused_fields(fresh: Any, old: Any) -> Any:
    """Returns the memory with the old values of fields that the new hyperparameters do not use.

    Torch keeps them too: a momentum buffer survives a stage with momentum 0.
    """
    if not isinstance(fresh, SGDState | RMSpropState):
        return fresh
    return type(fresh)(*(b if a is None else a for a, b in zip(fresh, old, strict=True)))


def _memory(state: Any) -> Any:
    """Returns the part of a state that is carried, without wrappers."""

    def inner(node: Any) -> Any:
        if type(node) not in _CARRIED_FIELD:
            return node
        field = _CARRIED_FIELD[type(node)]
        return None if field is None else _memory(getattr(node, field))

    return jax.tree.map(inner, state, is_leaf=_is_opaque)


def _with_memory(state: Any, memory: Any) -> Any:
    """Returns the state with its memory replaced; the inverse of `_memory`."""

    def replace(node: Any, part: Any) -> Any:
        if type(node) not in _CARRIED_FIELD:
            return part
        field = _CARRIED_FIELD[type(node)]
        if field is None:
            return node
        return node._replace(**{field: _with_memory(getattr(node, field), part)})

    return jax.tree.map(replace, state, memory, is_leaf=_is_opaque)


def _is_opaque(node: Any) -> bool:
    return type(node) in _CARRIED_FIELD or isinstance(node, SGDState | RMSpropState)


def _kind(memory: Any) -> Any:
    """Returns a key that identifies the optimizer, whatever its parameters and hyperparameters."""
    return [
        type(part)
        if isinstance(part, SGDState | RMSpropState)
        else jax.tree.structure(part, is_leaf=_is_masked)
        for part in _parts(memory)
    ]


def _partitions(state: Any, which: str) -> list[optax.PartitionState]:
    nodes = jax.tree.leaves(state, is_leaf=_is_partition)
    if not (partitions := [node for node in nodes if _is_partition(node)]):
        raise LabelError(
            f"carry: the {which} state, of type {type(state).__name__}, holds no multi_transform. "
            "carry takes states of jaxft.multi_transform and optax.multi_transform, also within "
            "optax.chain, masked, MultiSteps or inject_hyperparams."
        )
    return partitions


def _is_partition(node: Any) -> bool:
    return isinstance(node, optax.PartitionState)


def _dropped_moments(state: Any) -> list[str]:
    """Returns a warning about moments outside of the `multi_transform`s, if there are any."""
    outside = jax.tree.map(
        lambda node: None if _is_partition(node) else node, state, is_leaf=_is_partition
    )
    keyed, _ = jax.tree_util.tree_flatten_with_path(_memory(outside))
    names = dict.fromkeys(_field(path) for path, leaf in keyed if np.ndim(leaf))
    if not names:
        return []
    return [
        f"the state outside of the multi_transform ({', '.join(names)}) starts fresh: carry "
        "matches parameters by label."
    ]


def _dropped_gradients(state: Any) -> list[str]:
    """Returns a warning about gradients that a `MultiSteps` has accumulated, if there are any."""

    def is_accumulator(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    nodes = filter(is_accumulator, jax.tree.leaves(state, is_leaf=is_accumulator))
    counts = [n.mini_step for n in nodes if not isinstance(n.mini_step, jax.core.Tracer)]
    most = max(map(int, counts), default=0)
    if not most:
        return []
    return [
        f"MultiSteps holds the gradients of {most} mini-step{'s' * (most > 1)} towards its next "
        "step: they are dropped. A stage whose steps are a multiple of every_k_schedule drops "
        "none."
    ]


def _field(path: Iterable[Any]) -> str:
    """Returns the last attribute on a path: `ema`, `trace`, `mu`."""
    return [getattr(key, "name", str(key)) for key in path if hasattr(key, "name")][-1]


def _leaves(memory: Any) -> Leaves:
    keyed, _ = jax.tree_util.tree_flatten_with_path(_parts(memory), is_leaf=_is_masked)
    return {jax.tree_util.keystr(path): leaf for path, leaf in keyed}


def _is_masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _same_shape(a: Any, b: Any) -> bool:
    if a is None or _is_masked(a):
        return False
    return bool(np.shape(a) == np.shape(b) and a.dtype == b.dtype)


def _equal(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
