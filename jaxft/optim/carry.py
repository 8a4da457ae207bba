"""Carries optimizer state to new labels, matching parameters by path, whatever their label.

The state of `multi_transform({"head": optax.adam(1e-3)}, labels)`, where the body is frozen:

    PartitionState(inner_states={
        "head": MaskedState(inner_state=(              # one entry per label: a group
            ScaleByAdamState(                          # optax.adam is a chain of two transforms
                count=3,
                mu={"body": MaskedNode(), "head": {"w": [4 2]}},
                nu={"body": MaskedNode(), "head": {"w": [4 2]}},
            ),                                         # MaskedNode: a parameter of another group
            EmptyState(),                              # of the learning rate
        )),
        "frozen": MaskedState(inner_state=EmptyState()),
    })

The *memory* of a group is the part that is carried: the fields of its states, without wrappers.

    {Field("ScaleByAdamState", 0, "count"): 3,     # 0: the first state of this type
     Field("ScaleByAdamState", 0, "mu"): {"body": MaskedNode(), "head": {"w": [4 2]}},
     Field("ScaleByAdamState", 0, "nu"): {"body": MaskedNode(), "head": {"w": [4 2]}}}

A field that is a bare array, such as `count`, is shared by the group. In all other fields each leaf
belongs to one parameter. Its key is the field and the path of the leaf: `mu`, `['head']['w']`. Keys
do not depend on the name of the group, on wrappers or on positions in a chain.

A parked group is stored with the frozen label, without wrappers:

    "frozen": MaskedState(inner_state={"late": (ScaleByAdamState(...), EmptyState())})
"""

import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, overload

import jax
import numpy as np
import optax

from jaxft.errors import LabelError
from jaxft.labels import FROZEN
from jaxft.optim.carry_group import OldGroup, carry_group, old_groups_of
from jaxft.optim.carry_report import (
    CarryReport,
    Choice,
    fresh_warnings,
    period_warnings,
    resets,
)
from jaxft.optim.memory import (
    Field,
    is_partition,
    leaves_of,
    map_memory,
    memory_of,
    parameter_paths,
    unwrapped,
    with_memory,
    without_parameters,
    without_partitions,
)


@overload
def carry(
    old: optax.OptState,
    new: optax.OptState,
    *,
    park: Collection[str] = ...,
    report: Literal[False] = ...,
) -> optax.OptState: ...
@overload
def carry(
    old: optax.OptState, new: optax.OptState, *, park: Collection[str] = ..., report: Literal[True]
) -> tuple[optax.OptState, CarryReport]: ...
def carry(
    old: optax.OptState,
    new: optax.OptState,
    *,
    park: Collection[str] = (),
    report: bool = False,
) -> optax.OptState | tuple[optax.OptState, CarryReport]:
    """Copies optimizer state of the previous labels into a fresh state of the new labels.

    Works like torch's `add_param_group`: parameters that keep training keep their moments and step
    count, new ones start fresh. Parameters are matched by their path in the parameter tree, so
    groups may be renamed, split or merged. A group starts fresh, with a warning, if its optimizer
    changed (Adam and AdamW count as the same) or if it mixes parameters with different step counts
    (`jaxft.plan` never does).

    Only moments and their count are carried. Hyperparameters, positions of schedules and
    accumulated gradients are those in `new`, for jaxft's transforms and for optax's: the learning
    rate is the one that the new transform asks for. An optimizer that uses one count for its
    moments and its schedule (`optax.contrib.prodigy`) continues both.

    The `multi_transform` may be wrapped (`optax.chain`, `MultiSteps`, `apply_if_finite`,
    `inject_hyperparams`, ...) and may contain wrappers. Moments outside of it, and gradients that a
    `MultiSteps` has accumulated for its next step, are dropped with a warning.

    Under `jax.jit` and `jax.eval_shape`, groups may be renamed and split but not merged, because
    step counts cannot be compared there.

    Args:
      old: state of a `multi_transform` over the previous labels.
      new: initial state of a `multi_transform` over the new labels.
      park: labels whose state is kept while they do not train, in the state of the frozen label.
        Name them at each `carry` until they train again: state that is neither used nor parked is
        dropped.
      report: whether to return a `CarryReport` instead of warning.

    Returns:
      A state with the structure of `new`, apart from parked state; or `(state, report)`.

    Raises:
      LabelError: a state contains no `multi_transform`; the states contain different numbers of
        them; a label cannot be parked, because no transform belongs to `frozen`; or groups are
        merged under `jax.jit`.

    Example:
      >>> import jax.numpy as jnp, jaxft
      >>> params = {"body": jnp.ones(2), "head": jnp.ones(2)}
      >>> def relabel(*names):
      ...     labels = jaxft.label(params, {name: name for name in names})
      ...     return jaxft.multi_transform({name: optax.adam(0.1) for name in names}, labels)
      >>> first, second = relabel("head"), relabel("head", "body")
      >>> _, state = first.update(params, first.init(params), params)
      >>> state, report = carry(state, second.init(params), report=True)
      >>> [int(state.inner_states[name].inner_state[0].count) for name in ("head", "body")]
      [1, 0]
      >>> print(report)
      group  action   reason
      head   carried  the state of 'head'
      body   fresh    its parameters have no state yet
    """
    old_partitions, new_partitions = _partitions(old, "old"), _partitions(new, "new")
    if len(old_partitions) != len(new_partitions):
        raise LabelError(
            f"carry: the old state holds {len(old_partitions)} multi_transforms and the new one "
            f"{len(new_partitions)}. Build the transforms of both stages alike, or carry each "
            "multi_transform separately."
        )
    states, choices = [], []
    for old_partition, new_partition in zip(old_partitions, new_partitions, strict=True):
        state, partition_choices = _carry_partition(old_partition, new_partition, park)
        states.append(state)
        choices += partition_choices
    carried = iter(states)
    state = jax.tree.map(
        lambda node: next(carried) if is_partition(node) else node, new, is_leaf=is_partition
    )
    messages = [*period_warnings(old), *fresh_warnings(choices)]
    outside = leaves_of(memory_of(without_partitions(old))).items()
    fields = dict.fromkeys(field.name for (field, path), x in outside if path or np.ndim(x))
    if names := ", ".join(fields):
        choices.append(Choice("", "fresh", f"{names}: carry matches parameters by label"))
        messages.append(
            f"the state outside of the multi_transform ({names}) starts fresh: carry matches "
            "parameters by label."
        )
    choices += resets("", without_partitions(new))
    if report:
        return state, CarryReport(tuple(choices), tuple(messages))
    for message in messages:
        warnings.warn(message, stacklevel=2)
    return state


def _carry_partition(
    old: optax.PartitionState, new: optax.PartitionState, park: Collection[str]
) -> tuple[optax.PartitionState, list[Choice]]:
    """Carries the state of one `multi_transform`: fills the groups that train, parks the others."""
    old_groups, states = old_groups_of(old), dict(new.inner_states)
    new_memories = {name: memory_of(state) for name, state in states.items() if name != FROZEN}
    new_paths = {name: parameter_paths([memory]) for name, memory in new_memories.items()}
    training = set().union(*new_paths.values())
    choices: list[Choice] = []
    used: set[OldGroup] = set()
    for name, memory in new_memories.items():
        outcome = carry_group(name, memory, old_groups, elsewhere=training - new_paths[name])
        choices += [outcome.choice, *resets(name, states[name])]
        used.update(outcome.used_groups)
        states[name] = with_memory(states[name], outcome.memory)
    parked, unused_choices = _park(old_groups, park, used, new_paths)
    if parked:
        if FROZEN not in states:
            raise LabelError(
                f"carry: {', '.join(parked)} cannot be parked, as nothing is labelled {FROZEN!r}. "
                "Build the transform with jaxft.multi_transform."
            )
        states[FROZEN] = states[FROZEN]._replace(inner_state=parked)
    return new._replace(inner_states=states), choices + unused_choices


def _park(
    old_groups: Sequence[OldGroup],
    park: Collection[str],
    used: Collection[OldGroup],
    new_paths: Mapping[str, Collection[str]],
) -> tuple[dict[str, optax.OptState], list[Choice]]:
    """Returns the states to park, without wrappers and parameters that train, and the choices.

    Args:
      old_groups: the groups of the old state.
      park: names of the groups to park.
      used: old groups whose state is carried to new ones.
      new_paths: paths of the parameters that have state now, by new group.
    """
    training = set().union(*new_paths.values())

    def without_training(_: Field, value: Any) -> Any:
        return without_parameters(value, training)

    parked, choices = {}, []
    for group in old_groups:
        if not group.leaves:
            continue
        name, is_active = group.name, group.name in new_paths
        if name in park and not is_active and not group.lies_within(training):
            parked[name] = map_memory(without_training, unwrapped(group.state))
            reason = "name it in park at each carry until it trains again"
            choices.append(Choice(name, "parked", reason))
        elif group not in used and (reason := _why_dropped(group, training, new_paths.get(name))):
            choices.append(Choice(name, "dropped", reason))
    return parked, choices


def _why_dropped(
    group: OldGroup, training: Collection[str], paths_of_name: Collection[str] | None
) -> str:
    """Returns why the state of an old group is dropped; empty if its parameters keep their label.

    Args:
      group: the old group.
      training: paths of the parameters that have state now.
      paths_of_name: those in the new group of the same name; None if there is no such group.
    """
    if paths_of_name is not None:
        # Without other parameters in its place, the choice on the new group reports the loss.
        has_other_parameters = (
            group.paths and paths_of_name and group.paths.isdisjoint(paths_of_name)
        )
        if not has_other_parameters:
            return ""
    if group.lies_within(training):
        return "its parameters train in other groups"
    return "not named in park" if paths_of_name is None else "its name has other parameters now"


def _partitions(state: optax.OptState, which: str) -> list[optax.PartitionState]:
    nodes = jax.tree.leaves(state, is_leaf=is_partition)
    if not (partitions := [node for node in nodes if is_partition(node)]):
        raise LabelError(
            f"carry: the {which} state, of type {type(state).__name__}, holds no multi_transform. "
            "carry takes states of jaxft.multi_transform and optax.multi_transform, also within "
            "optax.chain, masked, MultiSteps or inject_hyperparams."
        )
    return partitions
