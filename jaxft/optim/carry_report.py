"""Report of `carry`: its decision on each group, and warnings about state that is lost."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import optax

from jaxft.optim.memory import reset_fields, states_within

# Reasons why parameters that have trained before start fresh. They are also warnings.
OTHER_OPTIMIZER = "has another optimizer now"
OTHER_ARRAYS = "has arrays of another shape or dtype now"
MIXES = "mixes parameters that have trained for different numbers of steps"

# Counts of wrappers that hold something between two steps, with the warning if they are above 0.
_PERIODS: dict[type, tuple[str, str]] = {
    optax.MultiStepsState: (
        "mini_step",
        "MultiSteps holds the gradients of {} mini-step{} towards its next step: they are "
        "dropped. A stage whose steps are a multiple of every_k_schedule drops none.",
    ),
    optax.contrib.SAMState: (
        "steps_since_sync",
        "sam is {} step{} past its last sync: the parameters stay where that has moved them. A "
        "stage whose steps are a multiple of sync_period ends with a sync.",
    ),
}


class Choice(NamedTuple):
    """Decision of `carry` on one group."""

    group: str
    """The group; empty for state outside of the `multi_transform`s."""
    action: Literal["carried", "fresh", "reset", "parked", "dropped"]
    """Moments and counts are `carried` from the old state, or `fresh` as in the new state.
    Hyperparameters, positions of schedules and accumulators are `reset` to those of the new state.
    Groups that do not train are `parked` with the frozen label, or `dropped`."""
    reason: str
    """Origin of the values, or why they are not carried."""


@dataclass(frozen=True)
class CarryReport:
    """Report of `carry`; as a string, a table.

    Attributes:
      choices: `(group, action, reason)`, in the order of the new labels.
      warnings: a sentence for each loss of state of parameters that keep training.
    """

    choices: tuple[Choice, ...]
    warnings: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("group", "action", "reason"), *((c.group or "-", *c[1:]) for c in self.choices)]
        widths = [max(len(row[column]) for row in rows) for column in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        return "\n".join([*lines, *(f"Warning: {warning}" for warning in self.warnings)])


def resets(group: str, state: optax.OptState) -> list[Choice]:
    """Returns a choice that lists the fields that are not carried, if there are any."""
    fields = [
        f"{type(node).__name__.removesuffix('State')}: {', '.join(names)}"
        for node in states_within(state)
        if (names := reset_fields(node))
    ]
    return [Choice(group, "reset", "; ".join(fields))] if fields else []


def fresh_warnings(choices: Iterable[Choice]) -> list[str]:
    """Returns a warning for each reason why parameters that have trained start fresh."""
    messages = []
    for reason in (OTHER_OPTIMIZER, OTHER_ARRAYS, MIXES):
        groups = [repr(choice.group) for choice in choices if choice.reason == reason]
        way_out = " Give them different labels, as jaxft.plan does." * (reason == MIXES)
        if len(groups) == 1:
            messages.append(f"group {groups[0]} {reason}: it starts fresh.{way_out}")
        elif groups:
            messages.append(f"groups {', '.join(groups)}: each {reason}, starts fresh.{way_out}")
    return messages


def period_warnings(state: optax.OptState) -> list[str]:
    """Returns a warning for each wrapper that is between two of its steps."""
    states, messages = list(states_within(state)), []
    for kind, (field, message) in _PERIODS.items():
        counts = [getattr(node, field) for node in states if isinstance(node, kind)]
        if most := max((int(x) for x in counts if is_known(x)), default=0):
            messages.append(message.format(most, "s" * (most > 1)))
    return messages


def is_known(x: Any) -> bool:
    """Returns whether a leaf has a value: it is neither traced nor a shape."""
    return not isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct)
