"""Carries optimizer state to one group of the new labels, from the groups of the old labels.

1. Only old groups with the same optimizer count. Its hyperparameters may differ.
2. A leaf that belongs to a parameter comes from the old leaf with the same key, shape and dtype,
   whatever the group. Active state, of parameters that trained, wins over parked state.
3. A leaf that the group shares, such as a step count, comes from the groups that rule 2 uses. They
   must agree on it, and all parameters must have old state. Otherwise the whole group starts fresh.
4. If no leaf belongs to a parameter, rule 2 uses the old group of the same name.
5. A field that the new hyperparameters do not use, such as the momentum buffers of a stage with
   momentum 0, is kept for later stages, as torch keeps it.

`jaxft.optim.carry` shows the state of a group, its memory and the keys of its leaves.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import optax
from jax.tree_util import keystr, tree_map_with_path

from jaxft.errors import LabelError
from jaxft.labels import FROZEN
from jaxft.optim.carry_report import MIXES, OTHER_ARRAYS, OTHER_OPTIMIZER, Choice, is_known
from jaxft.optim.memory import (
    Field,
    Key,
    Memory,
    is_masked,
    is_optional,
    leaves_of,
    memory_of,
    optimizer_of,
    parameter_paths,
    same_shape,
    without_parameters,
)


@dataclass(frozen=True, eq=False)  # compared by identity, since arrays cannot be hashed
class OldGroup:
    """A group of the old state.

    Attributes:
      name: the label; a parked group has the label that it trained with.
      is_parked: whether it is stored with the frozen label.
      state: its state, wrappers included.
      memory: memory of the state.
      leaves: arrays that may be carried. A parked group has none for a parameter that has trained
        since, in another group.
      paths: paths of its parameters.
      optimizer: its optimizer, see `optimizer_of`.
    """

    name: str
    is_parked: bool
    state: optax.OptState
    memory: Memory
    leaves: Mapping[Key, Any]
    paths: frozenset[str]
    optimizer: object

    def lies_within(self, paths: Collection[str]) -> bool:
        """Returns whether it has parameters, and all of them are among `paths`."""
        return bool(self.paths) and self.paths.issubset(paths)


class Outcome(NamedTuple):
    """The memory of a new group, and the old groups that it comes from."""

    memory: Memory
    choice: Choice
    used_groups: Sequence[OldGroup] = ()


def old_groups_of(old: optax.PartitionState) -> list[OldGroup]:
    """Returns the groups of the old state: the parked ones, then the active ones."""
    frozen = getattr(old.inner_states.get(FROZEN), "inner_state", None)
    parked = frozen if isinstance(frozen, dict) else {}
    active = {name: state for name, state in old.inner_states.items() if name != FROZEN}
    trained = parameter_paths(map(memory_of, active.values()))
    groups = []
    for states, is_parked in ((parked, True), (active, False)):
        for name, state in states.items():
            memory = memory_of(state)
            leaves = leaves_of(memory)
            if is_parked:
                leaves = {key: leaf for key, leaf in leaves.items() if key.path not in trained}
            paths, optimizer = frozenset(parameter_paths([memory])), optimizer_of(memory)
            groups.append(OldGroup(name, is_parked, state, memory, leaves, paths, optimizer))
    return groups


def carry_group(
    name: str, fresh: Memory, old_groups: Sequence[OldGroup], elsewhere: Collection[str]
) -> Outcome:
    """Fills the memory of a new group with old values, unless it must start fresh.

    Args:
      name: the new label.
      fresh: memory of the group's initial state.
      old_groups: the groups of the old state.
      elsewhere: paths of the parameters of the other new groups.
    """
    leaves, optimizer = leaves_of(fresh), optimizer_of(fresh)
    same_optimizer = [group for group in old_groups if group.optimizer == optimizer]
    same_name = next((group for group in reversed(same_optimizer) if group.name == name), None)
    if not leaves and same_name and same_name.leaves and not same_name.lies_within(elsewhere):
        reason = f"the state of {name!r}, which its optimizer does not use now"
        memory = {
            field: without_parameters(value, elsewhere) for field, value in same_name.memory.items()
        }
        return Outcome(memory, Choice(name, "carried", reason), [same_name])

    origin_by_key = _origins(leaves, same_optimizer, same_name)
    used = set(origin_by_key.values())
    used_groups = [group for group in old_groups if group in used]
    shared = [key for key in leaves if not key.path]
    is_partial = any(key.path and key not in origin_by_key for key in leaves)
    reason = ""
    if not origin_by_key:
        reason = _missing_origin(name, leaves, optimizer, old_groups, elsewhere)
    elif any(not same_shape(g.leaves.get(key), leaves[key]) for g in used_groups for key in shared):
        reason = OTHER_ARRAYS
    # A parameter without old state would have a count of 0.
    elif shared and (is_partial or not _same_values(name, shared, used_groups)):
        reason = MIXES
    if reason:
        return Outcome(fresh, Choice(name, "fresh", reason))
    values = {key: used_groups[0].leaves[key] for key in shared}
    values |= {key: group.leaves[key] for key, group in origin_by_key.items()}

    def carried(field: Field, value: Any) -> Any:
        if value is None and is_optional(field):
            return _unused_field(field, used_groups, {key.path for key in leaves})
        return tree_map_with_path(
            lambda path, leaf: values.get(Key(field, keystr(path)), leaf), value
        )

    origins = [
        f"the parked state of {group.name!r}" if group.is_parked else f"the state of {group.name!r}"
        for group in used_groups
    ]
    reason = " and ".join(origins)
    if is_partial:
        reason += "; arrays without old state start fresh"
    memory = {field: carried(field, value) for field, value in fresh.items()}
    return Outcome(memory, Choice(name, "carried", reason), used_groups)


def _origins(
    leaves: Mapping[Key, Any], same_optimizer: Sequence[OldGroup], same_name: OldGroup | None
) -> dict[Key, OldGroup]:
    """Returns the old group of each leaf that belongs to a parameter, if it has one.

    If no leaf has a parameter path, leaves come from the group of the same name. There are then
    only counts, or the parameters are a bare array, whose path is empty; for a bare array, the only
    group with this optimizer serves as well.
    """
    keys = [key for key in leaves if key.path]
    groups = same_optimizer
    if not keys:
        keys = list(leaves)
        is_bare_array = any(map(np.ndim, leaves.values()))
        if same_name:
            groups = [same_name]
        elif not is_bare_array or len(same_optimizer) > 1:
            groups = []
    return {
        key: group
        for key in keys
        for group in groups  # the active ones last, so that they win
        if same_shape(group.leaves.get(key), leaves[key])
    }


def _unused_field(field: Field, groups: Sequence[OldGroup], paths: Collection[str]) -> Any:
    """Returns the old values of a field, of the parameters at `paths`; None if there are none."""
    arrays = {
        key.path: leaf
        for group in groups
        for key, leaf in group.leaves.items()
        if key.field == field and key.path in paths
    }
    if not arrays:
        return None
    # The trees of all groups have the same structure, with holes for parameters of other groups.
    tree = next(group.memory[field] for group in groups if group.memory[field] is not None)
    return tree_map_with_path(
        lambda path, leaf: arrays.get(keystr(path), leaf if leaf is None else optax.MaskedNode()),
        tree,
        is_leaf=lambda node: node is None or is_masked(node),
    )


def _missing_origin(
    name: str,
    leaves: Mapping[Key, Any],
    optimizer: object,
    old_groups: Sequence[OldGroup],
    elsewhere: Collection[str],
) -> str:
    """Returns why no leaf of a group has an origin; see `carry_group`."""
    paths = {key.path for key in leaves if key.path}

    def has_parameters_of(group: OldGroup) -> bool:
        if paths:
            return any(path in group.paths for path in paths)
        return group.name == name and not group.lies_within(elsewhere)

    known = [group for group in old_groups if group.leaves and has_parameters_of(group)]
    if not known:
        return "its parameters have no state yet" if leaves else "its optimizer has no state"
    is_same = any(group.optimizer == optimizer for group in known)
    return OTHER_ARRAYS if is_same else OTHER_OPTIMIZER


def _same_values(name: str, keys: Sequence[Key], groups: Sequence[OldGroup]) -> bool:
    """Returns whether all groups have the same values, e.g. step counts.

    Raises:
      LabelError: the values are not known, because they are traced.
    """
    values = [[group.leaves[key] for key in keys] for group in groups]
    if len(groups) > 1 and not all(is_known(x) for row in values for x in row):
        raise LabelError(
            f"carry: {name!r} merges {' and '.join(repr(group.name) for group in groups)}, whose "
            "step counts cannot be compared under jax.jit. Call carry outside of it."
        )
    return all(np.all(a == b) for row in values[1:] for a, b in zip(values[0], row, strict=True))
