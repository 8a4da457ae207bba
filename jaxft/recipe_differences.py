"""Compares two recipes: the fields that make a run train differently."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.errors import first_of
from jaxft.recipe import RESULT_NEUTRAL_FIELDS, Recipe
from jaxft.stages import Stage

ABSENT = object()
"""Value of a stage or an entry that only the other recipe has."""


class Difference(NamedTuple):
    """A field with different values in two recipes; as text, `stages[all].epochs: 6 -> 9`."""

    path: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.path}: {_short_text(self.before)} -> {_short_text(self.now)}"


def differences(before: Recipe, now: Recipe) -> list[Difference]:
    """Returns the differences between two recipes that affect the result.

    Stages are matched by name and compared field by field.
    """
    return [
        difference
        for field in dataclasses.fields(Recipe)
        if field.name not in RESULT_NEUTRAL_FIELDS
        for difference in _differences(
            field.name, getattr(before, field.name), getattr(now, field.name)
        )
    ]


def listed(differences: Sequence[Difference]) -> str:
    """Returns the differences as lines for an error message, at most twelve."""
    return "\n  ".join(first_of(map(str, differences), 12))


def _differences(path: str, before: Any, now: Any) -> Iterator[Difference]:
    if before == now:
        return
    if all(isinstance(x, tuple) and x and isinstance(x[0], Stage) for x in (before, now)):
        before, now = ({stage.name: stage for stage in stages} for stages in (before, now))
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        shared = [key for key in before if key in now]
        for key in {**before, **now}:
            yield from _differences(f"{path}[{key}]", before.get(key, ABSENT), now.get(key, ABSENT))
        if shared != [key for key in now if key in before]:
            yield Difference(f"{path} (order)", ", ".join(before), ", ".join(now))
    elif dataclasses.is_dataclass(before) and type(before) is type(now):
        for field in dataclasses.fields(before):
            name = field.name
            yield from _differences(f"{path}.{name}", getattr(before, name), getattr(now, name))
    else:
        yield Difference(path, before, now)


def _short_text(value: Any) -> str:
    """Returns a value in at most 60 characters; a dataclass without its default fields."""
    if value is ABSENT:
        return "absent"
    if isinstance(value, Stage):
        return "a stage"
    text = repr(value)
    if dataclasses.is_dataclass(value):
        changed = [
            f"{field.name}={getattr(value, field.name)!r}"
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != field.default
        ]
        text = f"{type(value).__name__}({', '.join(changed)})"
    return text if len(text) <= 60 else text[:57] + "..."


def refused(before: Recipe, now: Recipe) -> list[Difference]:
    """Returns the differences between the recipes that `--extend` does not allow."""
    last = before.stages[-1].name
    longer = [f"stages[{last}].{field}" for field in ("epochs", "steps", "max_minutes")]
    longer += [f"stages[{last}].until.{field}" for field in ("patience", "min_epochs")]
    names = [stage.name for stage in now.stages]
    appended = [f"stages[{name}]" for name in names[len(before.stages) :]]
    return [
        each
        for each in differences(before, now)
        if not (each.path in longer and _is_more(each))
        and not (each.path in appended and each.before is ABSENT)
    ]


def _is_more(each: Difference) -> bool:
    if each.before is None or each.now is None:  # a limit that is no more
        return each.now is None
    return bool(each.now > each.before)
