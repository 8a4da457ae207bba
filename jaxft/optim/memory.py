"""The memory of an optimizer state: the part that `carry` takes over to new labels.

`jaxft.optim.carry` shows an example.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxft.optim.optimizers import RMSpropState, SGDState
from jaxft.optim.transform import GroupState


class Field(NamedTuple):
    """A field of a state, the key of a memory.

    Does not depend on wrappers or on positions in a chain.
    """

    state: str
    """Type of the state, such as `ScaleByAdamState`."""
    number: int
    """Number of states of this type before it."""
    name: str
    """Name of the field, such as `mu`; empty for a state that is not a NamedTuple."""


class Key(NamedTuple):
    """Identifies a leaf of a memory, in whichever group it is."""

    field: Field
    path: str
    """Path within the field, such as `["head"]["w"]`; empty if the field is a bare array."""


Memory = dict[Field, Any]

# The fields that are carried, where these are not all. The others start with the stage:
# hyperparameters, positions of schedules, accumulated gradients, counts of skipped steps.
# A state with a single field here is a wrapper.
_CARRIED_FIELDS: dict[type, tuple[str, ...]] = {
    GroupState: ("rule",),
    optax.PartitionState: ("inner_states",),
    optax.MaskedState: ("inner_state",),
    optax.InjectHyperparamsState: ("inner_state",),
    optax.InjectStatefulHyperparamsState: ("inner_state",),
    optax.MultiStepsState: ("inner_opt_state",),
    optax.ApplyIfFiniteState: ("inner_state",),
    optax.ConditionallyTransformState: ("inner_state",),
    optax.ConditionallyMaskState: ("inner_state",),
    optax.LookaheadState: ("fast_state",),
    optax.contrib.SAMState: ("opt_state",),
    optax.contrib.ScheduleFreeState: ("weight_sum", "max_lr", "base_optimizer_state", "z"),
    optax.contrib.MuonState: ("count", "mu"),
    optax.contrib.ReduceLROnPlateauState: (),
    optax.ScaleByScheduleState: (),
    optax.AddNoiseState: (),
}
# Their fields are None where the hyperparameters do not need them.
_WITH_OPTIONAL_FIELDS = (SGDState, RMSpropState)


def memory_of(state: optax.OptState) -> Memory:
    """Returns the memory of a state."""
    memory: Memory = {}

    def read(field: Field, value: Any) -> Any:
        memory[field] = value
        return value

    map_memory(read, state)
    return memory


def map_memory(function: Callable[[Field, Any], Any], state: optax.OptState) -> optax.OptState:
    """Returns a state in which each field of its memory is replaced by `function(field, value)`."""
    numbers: Counter[str] = Counter()

    def replace(kind: str, names: tuple[str, ...], values: tuple[Any, ...]) -> dict[str, Any]:
        number = numbers[kind]
        numbers[kind] += 1
        return {
            name: visit(value) if _is_state(value) else function(Field(kind, number, name), value)
            for name, value in zip(names, values, strict=True)
        }

    def visit(node: Any) -> Any:
        if node is None:
            return None
        if _is_chain(node):
            # Sorted, because the dict of a named chain loses its order under jit.
            keys = sorted(node) if isinstance(node, dict) else range(len(node))
            children = {key: visit(node[key]) for key in keys}
            return children if isinstance(node, dict) else tuple(children.values())
        if not _is_named_tuple(node):
            return replace("", ("",), (node,))[""]
        names = _carried_fields(node)
        if _is_wrapper(node):
            return node._replace(**{names[0]: visit(getattr(node, names[0]))})
        values = tuple(getattr(node, name) for name in names)
        return node._replace(**replace(type(node).__name__, names, values))

    return visit(state)


def with_memory(state: optax.OptState, memory: Memory) -> optax.OptState:
    """Returns a state with another memory."""
    return map_memory(lambda field, value: memory.get(field, value), state)


def leaves_of(memory: Memory) -> dict[Key, Any]:
    """Returns the arrays of a memory."""
    return {
        Key(field, jax.tree_util.keystr(path)): leaf
        for field, value in memory.items()
        for path, leaf in jax.tree_util.tree_flatten_with_path(value)[0]
    }


def parameter_paths(memories: Iterable[Memory]) -> set[str]:
    """Returns the paths of all leaves that belong to one parameter."""
    return {key.path for memory in memories for key in leaves_of(memory) if key.path}


def without_parameters(value: Any, paths: Collection[str]) -> Any:
    """Returns the value of a field with a hole for each parameter at `paths`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: optax.MaskedNode() if jax.tree_util.keystr(path) in paths else x, value
    )


def same_shape(a: Any, b: Any) -> bool:
    """Returns whether two leaves have the same shape and dtype; False if the first is None."""
    if a is None:
        return False
    kinds = [getattr(x, "dtype", type(x)) for x in (a, b)]
    return np.shape(a) == np.shape(b) and kinds[0] == kinds[1]


def optimizer_of(memory: Memory) -> set[tuple[str, int]]:
    """Returns a key that identifies the optimizer, whatever its hyperparameters.

    States without arrays depend on hyperparameters, so they must not count: optax's Adam has one
    for its decay, and different ones for a schedule and for a constant learning rate.
    """
    return {
        (field.state, field.number)
        for field, value in memory.items()
        if is_optional(field) or value is not None
    }


def is_optional(field: Field) -> bool:
    """Returns whether a field is None where the hyperparameters do not need it."""
    return field.state in {kind.__name__ for kind in _WITH_OPTIONAL_FIELDS}


def unwrapped(state: optax.OptState) -> optax.OptState:
    """Returns a state without wrappers and without states that start with the stage."""
    if _is_chain(state):
        if isinstance(state, dict):
            return {key: unwrapped(child) for key, child in state.items()}
        return tuple(map(unwrapped, state))
    if not _is_named_tuple(state):
        return state
    names = _carried_fields(state)
    if _is_wrapper(state):
        return unwrapped(getattr(state, names[0]))
    return state if names or not state._fields else None


def states_within(state: optax.OptState) -> Iterator[Any]:
    """Yields each NamedTuple of a state, wrappers included."""
    if _is_chain(state):
        children = state.values() if isinstance(state, dict) else state
    elif _is_named_tuple(state):
        yield state
        children = [child for child in state if _is_state(child) or _is_chain(child)]
    else:
        return
    for child in children:
        yield from states_within(child)


def reset_fields(state: Any) -> list[str]:
    """Returns the names of the fields of a NamedTuple that start with the stage."""
    return [
        name
        for name in state._fields
        if name not in _carried_fields(state) and jax.tree.leaves(getattr(state, name))
    ]


def is_partition(node: Any) -> bool:
    """Returns whether a node is the state of a `multi_transform`."""
    return isinstance(node, optax.PartitionState)


def without_partitions(state: optax.OptState) -> optax.OptState:
    """Returns the state outside of all `multi_transform`s."""
    return jax.tree.map(
        lambda node: optax.EmptyState() if is_partition(node) else node,
        state,
        is_leaf=is_partition,
    )


def is_masked(node: Any) -> bool:
    """Returns whether a node stands for a parameter of another group."""
    return isinstance(node, optax.MaskedNode)


def _carried_fields(state: Any) -> tuple[str, ...]:
    return _CARRIED_FIELDS.get(type(state), state._fields)


def _is_wrapper(state: Any) -> bool:
    return len(_CARRIED_FIELDS.get(type(state), ())) == 1


def _is_named_tuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields") and not is_masked(node)


def _is_chain(node: Any) -> bool:
    """Returns whether a state joins others: a `chain`, a `named_chain`, labels by name."""
    if isinstance(node, dict):
        return bool(node) and all(isinstance(x, tuple) and not is_masked(x) for x in node.values())
    return type(node) is tuple


def _is_state(value: Any) -> bool:
    """Returns whether the value of a field is a state and not parameters.

    Parameters may be tuples and NamedTuples too, but not those of optax.
    """
    if type(value) is tuple:
        return any(map(_is_state, value))
    return _is_named_tuple(value) and type(value).__module__.partition(".")[0] in ("optax", "jaxft")
