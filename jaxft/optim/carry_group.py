"""Carries optimizer state to one group of the new labels, from groups of the old ones.

`jaxft.optim.carry` shows the state of a group and its memory.
"""

from collections.abc import Mapping, Sequence
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
    is_optional,
    leaves_of,
    memory_of,
    optimizer_of,
    parameter_paths,
    same_shape,
)


class Source(NamedTuple):
    """A group of the old state."""

    group: str
    is_parked: bool
    state: optax.OptState
    memory: Memory
    leaves: dict[Key, Any]
    """Arrays that may be carried."""
    paths: set[str]
    """Paths of its parameters."""
    optimizer: object


class Outcome(NamedTuple):
    """The memory of a new group, and the sources that it comes from."""

    memory: Memory
    choice: Choice
    donors: Sequence[Source] = ()


def find_sources(old: optax.PartitionState) -> list[Source]:
    """Returns the groups of the old state: the parked ones, then those that trained.

    Leaves out parked state of parameters that have trained since, in another group.
    """
    frozen = getattr(old.inner_states.get(FROZEN), "inner_state", None)
    parked = frozen if isinstance(frozen, dict) else {}
    active = {group: state for group, state in old.inner_states.items() if group != FROZEN}
    trained = parameter_paths(map(memory_of, active.values()))
    sources = []
    for groups, is_parked in ((parked, True), (active, False)):
        for group, state in groups.items():
            memory = memory_of(state)
            leaves = leaves_of(memory)
            if is_parked:
                leaves = {key: leaf for key, leaf in leaves.items() if key[1] not in trained}
            paths, optimizer = parameter_paths([memory]), optimizer_of(memory)
            sources.append(Source(group, is_parked, state, memory, leaves, paths, optimizer))
    return sources


def carry_group(group: str, fresh: Memory, sources: Sequence[Source]) -> Outcome:
    """Fills the memory of a group with old values, unless it must start fresh."""
    leaves, optimizer = leaves_of(fresh), optimizer_of(fresh)
    alike = [source for source in sources if source.optimizer == optimizer]
    namesake = next((source for source in reversed(alike) if source.group == group), None)
    if not leaves and namesake and namesake.leaves:
        # Torch keeps what it does not use: a momentum buffer survives a stage with momentum 0.
        reason = f"the state of {group!r}, which its optimizer does not use now"
        return Outcome(namesake.memory, Choice(group, "carried", reason), [namesake])

    origins = _origins(leaves, alike, namesake)
    origin_ids = set(map(id, origins.values()))
    donors = [source for source in sources if id(source) in origin_ids]
    shared = [key for key in leaves if not key[1]]
    is_partial = len({*origins, *shared}) < len(leaves)
    reason = ""
    if not origins:
        reason = _missing_origin(group, leaves, optimizer, sources)
    elif any(not same_shape(x.leaves.get(key), leaves[key]) for x in donors for key in shared):
        reason = OTHER_ARRAYS
    elif shared and (is_partial or not _same_values(group, shared, donors)):
        reason = MIXES
    if reason:
        return Outcome(fresh, Choice(group, "fresh", reason))
    values = {key: donors[0].leaves[key] for key in shared}
    values |= {key: source.leaves[key] for key, source in origins.items()}

    def carried(field: Field, value: Any) -> Any:
        if value is None and is_optional(field) and namesake:  # not used now, see above
            return namesake.memory[field]
        return tree_map_with_path(lambda path, leaf: values.get((field, keystr(path)), leaf), value)

    names = [f"the {'parked ' * donor.is_parked}state of {donor.group!r}" for donor in donors]
    reason = " and ".join(names) + "; arrays without old state start fresh" * is_partial
    memory = {field: carried(field, value) for field, value in fresh.items()}
    return Outcome(memory, Choice(group, "carried", reason), donors)


def _origins(
    leaves: Mapping[Key, Any], alike: Sequence[Source], namesake: Source | None
) -> dict[Key, Source]:
    """Returns the source of each leaf that belongs to a parameter, if it has one.

    If no leaf does, the name of the group decides: the state holds counts alone, or the parameters
    are a single array.
    """
    keys = [key for key in leaves if key[1]]
    if not keys:
        keys = list(leaves)
        is_array = len(alike) == 1 and any(map(np.ndim, leaves.values()))
        alike = [namesake] if namesake else alike if is_array else []
    return {
        key: source
        for key in keys
        for source in alike
        if same_shape(source.leaves.get(key), leaves[key])
    }


def _missing_origin(
    group: str, leaves: Mapping[Key, Any], optimizer: object, sources: Sequence[Source]
) -> str:
    """Returns why no leaf of a group has an origin."""
    paths = {path for _, path in leaves if path}
    known = [
        source
        for source in sources
        if source.leaves and (paths & source.paths if paths else source.group == group)
    ]
    if not known:
        return "its parameters have no state yet" if leaves else "its optimizer has no state"
    is_same = any(source.optimizer == optimizer for source in known)
    return OTHER_ARRAYS if is_same else OTHER_OPTIMIZER


def _same_values(group: str, keys: Sequence[Key], donors: Sequence[Source]) -> bool:
    """Returns whether all donors have the same values, e.g. step counts.

    Raises:
      LabelError: the values are not known, because they are traced.
    """
    values = [[donor.leaves[key] for key in keys] for donor in donors]
    if len(donors) > 1 and not all(is_known(x) for row in values for x in row):
        raise LabelError(
            f"carry: {group!r} merges {' and '.join(repr(donor.group) for donor in donors)}, whose "
            "step counts cannot be compared under jax.jit. Call carry outside of it."
        )
    return all(np.all(a == b) for row in values[1:] for a, b in zip(values[0], row, strict=True))
