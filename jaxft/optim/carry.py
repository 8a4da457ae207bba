"""An optimizer's state across re-labelling: found by group and path, never by position."""

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
"""The leaves of a memory by their key path, `MaskedNode` where a parameter is another group's."""

# The states of which one field, or none, is carried. All else starts with the stage: positions of
# schedules, hyperparameters, accumulated gradients, counts of skipped steps.
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
    """Returns the fresh state `new` with what `old` remembers of each parameter.

    Like torch's `add_param_group`: parameters that stay keep their moments and step count,
    newcomers start afresh. A change of hyperparameters loses nothing. Groups may be renamed, split
    or merged. A group starts afresh, with a warning, if its optimizer has changed (Adam and AdamW
    count as one) or if it mixes parameters whose step counts differ (`jaxft.plan` never does).

    Only moments and their counts are carried. Learning rates and other hyperparameters, positions
    of schedules and accumulated gradients are those of `new`, in jaxft's transforms as in optax's.

    The `multi_transform` may lie within others (`optax.chain`, `MultiSteps`, `apply_if_finite`,
    `inject_hyperparams`, ...), and these within it. Moments outside of it start afresh, with a
    warning; so do gradients that a `MultiSteps` has accumulated for a step not yet taken.

    Args:
      old: the state of a `multi_transform` over the previous labels.
      new: the fresh state (`init`) of the one over the new labels.
      park: labels whose state is kept aside while they do not train, so that a later `carry`
        finds it again. It lies with the frozen label; all else that is not used is dropped.

    Raises:
      LabelError: a state without a `multi_transform`, or two states with different numbers of them.

    >>> import jax.numpy as jnp, jaxft
    >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
    >>> def relabel(rules):
    ...     labels = jaxft.label(params, rules)
    ...     return jaxft.multi_transform({name: optax.adam(0.1) for name in rules.values()}, labels)
    >>> first, second = relabel({"head": "head"}), relabel({"head": "head", "body": "body"})
    >>> _, state = first.update(params, first.init(params), params)
    >>> state = carry(state, second.init(params))
    >>> [int(state.inner_states[name].inner_state[0].count) for name in ("head", "body")]
    [1, 0]
    """
    state, remarks = carry_with_remarks(old, new, park=park)
    for remark in remarks:
        warnings.warn(remark, stacklevel=2)
    return state


def carry_with_remarks(
    old: optax.OptState, new: optax.OptState, *, park: Collection[str] = ()
) -> tuple[optax.OptState, list[str]]:
    """Returns what `carry` returns, and its warnings as sentences."""
    olds, news = _partitions(old, "old"), _partitions(new, "new")
    if len(olds) != len(news):
        raise LabelError(
            f"carry: the old state holds {len(olds)} multi_transforms and the new one "
            f"{len(news)}. Build both stages' transforms alike, or carry each state by itself."
        )
    remarks = [*_lost_outside(old), *_half_accumulated(old)]
    states = []
    for pair in zip(olds, news, strict=True):
        state, more = _carry_partition(*pair, park)
        states.append(state)
        remarks += more
    carried = iter(states)
    return (
        jax.tree.map(
            lambda n: next(carried) if _is_partition(n) else n, new, is_leaf=_is_partition
        ),
        remarks,
    )


def _carry_partition(
    old: optax.PartitionState, new: optax.PartitionState, park: Collection[str]
) -> tuple[optax.PartitionState, list[str]]:
    olds = {group: _memory(state) for group, state in old.inner_states.items()}
    parked = olds.pop(FROZEN, None)
    olds |= parked if isinstance(parked, dict) else {}
    states = dict(new.inner_states)
    news = {group: _memory(state) for group, state in states.items() if group != FROZEN}
    every = [_leaves(memory) for memory in (*olds.values(), *news.values())]
    masked = {path for leaves in every for path, leaf in leaves.items() if _masked(leaf)}
    remarks, changed = [], []
    for group, fresh in news.items():
        same = {name: memory for name, memory in olds.items() if _kind(memory) == _kind(fresh)}
        sources = {name: _leaves(memory) for name, memory in same.items()}
        taken, remark = _take(group, _leaves(fresh), sources, masked)
        if remark:
            remarks.append(remark)
        elif not taken and group not in same and jax.tree.leaves(olds.get(group)):
            changed.append(group)
        memory = _filled(fresh, taken)
        if group in same:
            memory = _with_unused(memory, same[group])
        states[group] = _with_memory(states[group], memory)
    if changed:
        remarks.append(_now_differ(changed))
    if kept := {group: memory for group, memory in olds.items() if group in set(park) - set(news)}:
        if FROZEN not in states:
            raise LabelError(
                f"carry: {', '.join(kept)} cannot be parked, as nothing is labelled {FROZEN!r}. "
                "Build the transform with jaxft.multi_transform."
            )
        states[FROZEN] = states[FROZEN]._replace(inner_state=kept)
    return new._replace(inner_states=states), remarks


def _now_differ(groups: list[str]) -> str:
    names = ", ".join(map(repr, groups))
    if len(groups) == 1:
        return f"group {names} has another optimizer now: it starts afresh."
    return f"groups {names} have another optimizer now: they start afresh."


def _take(
    group: str, fresh: Leaves, sources: Mapping[str, Leaves], masked: Collection[str]
) -> tuple[Leaves, str]:
    """Returns the leaves of `fresh` that `sources` have, or a remark on why they are of no use."""
    wanted = {path: leaf for path, leaf in fresh.items() if not _masked(leaf)}
    # What is masked out elsewhere, or no scalar, belongs to one parameter; the rest, such as
    # Adam's count, to the whole group.
    mine = [path for path, leaf in wanted.items() if path in masked or np.ndim(leaf)]
    if not mine:  # a mere count: only the group itself can say
        return {path: sources[group][path] for path in wanted} if group in sources else {}, ""
    holder = {
        path: name
        for path in mine
        for name, leaves in sources.items()
        if _alike(leaves.get(path), wanted[path])
    }
    if not holder:
        return {}, ""
    donors = [sources[name] for name in dict.fromkeys(holder.values())]
    shared = [path for path in wanted if path not in mine]
    counts = [[donor[path] for path in shared] for donor in donors]
    newcomers = len(holder) < len(mine)
    if shared and (newcomers or any(not _equal(counts[0], other) for other in counts[1:])):
        return {}, (
            f"group {group!r} mixes parameters that have trained for different times: it starts "
            "afresh. Give them labels of their own, as jaxft.plan does."
        )
    known = dict(zip(shared, counts[0], strict=True))
    return known | {path: sources[name][path] for path, name in holder.items()}, ""


def _filled(memory: Any, taken: Leaves) -> Any:
    parts = jax.tree_util.tree_map_with_path(
        lambda path, leaf: taken.get(jax.tree_util.keystr(path), leaf),
        _parts(memory),
        is_leaf=_masked,
    )
    remaining = iter(parts)

    def put(node: Any) -> Any:
        if type(node) is tuple:
            return tuple(map(put, node))
        return next(remaining) if _parts(node) else node

    return put(memory)


def _parts(memory: Any) -> list[Any]:
    """The states of a chain that hold arrays, in order, however the chain is nested.

    Those that hold none come and go with hyperparameters: optax's Adam has one for its decay, and
    another one with a schedule than with a constant rate.
    """
    if type(memory) is tuple:
        return [part for node in memory for part in _parts(node)]
    ours = isinstance(memory, SGDState | RMSpropState)
    return [memory] if ours or jax.tree.leaves(memory, is_leaf=_masked) else []


def _with_unused(fresh: Any, old: Any) -> Any:
    """The memory with the old fields that its own hyperparameters do not use.

    Torch keeps them as well: a momentum buffer waits while the momentum is 0.
    """
    if not isinstance(fresh, SGDState | RMSpropState):
        return fresh
    return type(fresh)(*(b if a is None else a for a, b in zip(fresh, old, strict=True)))


def _memory(state: Any) -> Any:
    """The part of a state that is carried, without the wrappers around it."""

    def inner(node: Any) -> Any:
        if type(node) not in _CARRIED_FIELD:
            return node
        field = _CARRIED_FIELD[type(node)]
        return None if field is None else _memory(getattr(node, field))

    return jax.tree.map(inner, state, is_leaf=_is_opaque)


def _with_memory(state: Any, memory: Any) -> Any:
    """The inverse of `_memory`: the state with this as what is carried."""

    def put(node: Any, part: Any) -> Any:
        if type(node) not in _CARRIED_FIELD:
            return part
        field = _CARRIED_FIELD[type(node)]
        if field is None:
            return node
        return node._replace(**{field: _with_memory(getattr(node, field), part)})

    return jax.tree.map(put, state, memory, is_leaf=_is_opaque)


def _is_opaque(node: Any) -> bool:
    return type(node) in _CARRIED_FIELD or isinstance(node, SGDState | RMSpropState)


def _kind(memory: Any) -> Any:
    """Equal for states of one optimizer, whatever its parameters and hyperparameters."""
    return [
        type(part)
        if isinstance(part, SGDState | RMSpropState)
        else jax.tree.structure(part, is_leaf=_masked)
        for part in _parts(memory)
    ]


def _partitions(state: Any, which: str) -> list[optax.PartitionState]:
    nodes = jax.tree.leaves(state, is_leaf=_is_partition)
    if not (found := [node for node in nodes if _is_partition(node)]):
        raise LabelError(
            f"carry: the {which} state, of type {type(state).__name__}, holds no multi_transform. "
            "The states of jaxft.multi_transform and optax.multi_transform can be carried, and of "
            "transforms around them such as optax.chain, masked, MultiSteps or inject_hyperparams."
        )
    return found


def _is_partition(node: Any) -> bool:
    return isinstance(node, optax.PartitionState)


def _lost_outside(state: Any) -> list[str]:
    outside = jax.tree.map(
        lambda node: None if _is_partition(node) else node, state, is_leaf=_is_partition
    )
    keyed, _ = jax.tree_util.tree_flatten_with_path(_memory(outside))
    names = dict.fromkeys(_field(path) for path, leaf in keyed if np.ndim(leaf))
    if not names:
        return []
    return [
        f"the state outside of the multi_transform ({', '.join(names)}) starts afresh: only what "
        "is labelled is carried."
    ]


def _half_accumulated(state: Any) -> list[str]:
    """A remark on gradients that a `MultiSteps` holds for a step which it has not taken."""

    def is_accumulator(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    nodes = filter(is_accumulator, jax.tree.leaves(state, is_leaf=is_accumulator))
    counts = [n.mini_step for n in nodes if not isinstance(n.mini_step, jax.core.Tracer)]
    most = max(map(int, counts), default=0)
    if not most:
        return []
    return [
        f"MultiSteps holds the gradients of {most} mini-step{'s' * (most > 1)} towards its next "
        "step: they are dropped, and it starts afresh. A stage whose steps are a multiple of "
        "every_k_schedule loses none."
    ]


def _field(path: Iterable[Any]) -> str:
    """The last attribute on a path: `ema`, `trace`, `mu`."""
    return [getattr(key, "name", str(key)) for key in path if hasattr(key, "name")][-1]


def _leaves(memory: Any) -> Leaves:
    keyed, _ = jax.tree_util.tree_flatten_with_path(_parts(memory), is_leaf=_masked)
    return {jax.tree_util.keystr(path): leaf for path, leaf in keyed}


def _masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _alike(a: Any, b: Any) -> bool:
    if a is None or _masked(a):
        return False
    return bool(np.shape(a) == np.shape(b) and a.dtype == b.dtype)


def _equal(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
