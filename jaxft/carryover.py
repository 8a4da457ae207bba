"""An optimizer's state across re-labelling: found by group and path, never by position."""

import warnings
from collections.abc import Collection, Mapping
from typing import Any

import jax
import numpy as np
import optax

from jaxft.labels import FROZEN
from jaxft.optim import GroupState

Leaves = dict[str, Any]
"""The leaves of a rule's state by their key path, `MaskedNode` where a parameter is another's."""


def carry(
    old: optax.OptState, new: optax.OptState, *, park: Collection[str] = ()
) -> optax.OptState:
    """The fresh state of a new labelling, with what the old one knows of each parameter.

    Like torch's `add_param_group`: who stays keeps moments and count, who joins starts afresh.
    Groups may be renamed, split, or merged. Where one cannot go on (its optimizer has changed,
    or it mixes parameters whose step counts differ, which `jaxft.plan` never does) it starts
    afresh, with a warning. Of our own transforms only the rule's state is carried, never the
    position of a schedule: that starts with its stage. A foreign transform is carried whole.

    Args:
      old: the state of a `multi_transform` over the previous labels.
      new: the fresh state (`init`) of the one over the new labels.
      park: labels whose state is kept aside while they do not train, so that a later `carry`
        finds it again. It lies with the frozen label; all else that is not used is dropped.

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
    """`carry`, with its warnings as sentences."""
    rules = {group: _rule(s) for group, s in old.inner_states.items() if group != FROZEN}
    parked = old.inner_states[FROZEN].inner_state
    rules |= parked if isinstance(parked, dict) else {}
    states, remarks = dict(new.inner_states), []
    fresh = {group: _rule(s) for group, s in states.items() if group != FROZEN}
    every = [_leaves(rule) for rule in (*rules.values(), *fresh.values())]
    masked = {path for leaves in every for path, leaf in leaves.items() if _masked(leaf)}
    for group, rule in fresh.items():
        same = {name: _leaves(r) for name, r in rules.items() if _kind(r) == _kind(rule)}
        taken, remark = _take(group, _leaves(rule), same, masked)
        if not taken and not remark and group not in same and jax.tree.leaves(rules.get(group)):
            remark = f"group {group!r} has another optimizer now: it starts afresh."
        remarks += [remark] if remark else []
        if taken:
            states[group] = _with_rule(
                states[group], jax.tree.unflatten(jax.tree.structure(rule), taken)
            )
    if kept := {group: rule for group, rule in rules.items() if group in set(park) - set(fresh)}:
        states[FROZEN] = states[FROZEN]._replace(inner_state=kept)
    return new._replace(inner_states=states), remarks


def _take(
    group: str, fresh: Leaves, sources: Mapping[str, Leaves], masked: Collection[str]
) -> tuple[list[Any], str]:
    """The leaves for `fresh` from those who had them, or none; and why not, if that is news."""
    wanted = {path: leaf for path, leaf in fresh.items() if not _masked(leaf)}
    # What is masked out elsewhere, or no scalar, belongs to one parameter; the rest, such as
    # Adam's count, to the whole group.
    mine = [path for path, leaf in wanted.items() if path in masked or np.ndim(leaf)]
    if not mine:  # a mere count: only the group itself can say
        return [sources[group][path] for path in wanted] if group in sources else [], ""
    holder = {
        path: name
        for path in mine
        for name, leaves in sources.items()
        if not _masked(leaves[path]) and _alike(leaves[path], wanted[path])
    }
    if not holder:
        return [], ""
    donors = [sources[name] for name in dict.fromkeys(holder.values())]
    shared = [path for path in wanted if path not in mine]
    counts = [[donor[path] for path in shared] for donor in donors]
    newcomers = len(holder) < len(mine)
    if shared and (newcomers or any(not _equal(counts[0], other) for other in counts[1:])):
        return [], (
            f"group {group!r} mixes parameters that have trained for different times: it starts "
            "afresh. Give them labels of their own, as jaxft.plan does."
        )
    known = dict(zip(shared, counts[0], strict=True))
    known |= {path: sources[name][path] for path, name in holder.items()}
    return [known.get(path, leaf) for path, leaf in wanted.items()], ""


def _rule(state: Any) -> Any:
    inner = state.inner_state
    return inner.rule if isinstance(inner, GroupState) else inner


def _with_rule(state: Any, rule: Any) -> Any:
    inner = state.inner_state
    new = inner._replace(rule=rule) if isinstance(inner, GroupState) else rule
    return state._replace(inner_state=new)


def _leaves(rule: Any) -> Leaves:
    keyed, _ = jax.tree_util.tree_flatten_with_path(rule, is_leaf=_masked)
    return {jax.tree_util.keystr(path): leaf for path, leaf in keyed}


def _kind(rule: Any) -> Any:
    """What tells one optimizer's state from another's, whichever parameters it is of."""
    return jax.tree.structure(rule, is_leaf=_masked)


def _masked(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def _alike(a: Any, b: Any) -> bool:
    return bool(np.shape(a) == np.shape(b) and a.dtype == b.dtype)


def _equal(a: list[Any], b: list[Any]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
