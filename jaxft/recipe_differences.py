"""The fields by which two recipes train differently, those of stages each by itself."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jaxft.errors import first_of
from jaxft.recipe import CHANGES_NOTHING, Recipe
from jaxft.stages import Stage


class Difference(NamedTuple):
    """A field that two recipes do not share; as text, `stages[all].epochs: 6 -> 9`.

    `before` or `now` is `ABSENT` where only the other recipe has the stage or the entry.
    """

    path: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.before)} -> {_shown(self.now)}"


ABSENT = object()


def differences(before: Recipe, now: Recipe) -> list[Difference]:
    """Returns the fields by which two recipes train differently, those of stages each by itself."""
    return [
        difference
        for field in dataclasses.fields(Recipe)
        if field.name not in CHANGES_NOTHING
        for difference in _differences(
            field.name, getattr(before, field.name), getattr(now, field.name)
        )
    ]


def listed(found: Sequence[Difference]) -> str:
    """Returns a line for each of the differences, at most twelve."""
    return "\n  ".join(first_of(map(str, found), 12))


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


def _shown(value: Any) -> str:
    """A value in at most 60 characters; of a dataclass the fields that are not by default."""
    if value is ABSENT:
        return "absent"
    if isinstance(value, Stage):
        return "a stage"
    text = repr(value)
    if dataclasses.is_dataclass(value):
        said = [
            f"{field.name}={getattr(value, field.name)!r}"
            for field in dataclasses.fields(value)
            if getattr(value, field.name) != field.default
        ]
        text = f"{type(value).__name__}({', '.join(said)})"
    return text if len(text) <= 60 else text[:57] + "..."
