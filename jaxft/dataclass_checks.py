"""Dataclasses that check the names and types of their arguments, all at once.

Python alone ends with a TypeError at the first unknown name, and checks no type at all.
"""

import dataclasses
import difflib
import os
import reprlib
import types
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from numbers import Integral, Real
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np

from jaxft.errors import RecipeError

T = TypeVar("T")

CLASSES: dict[str, type] = {}
"""The checked dataclasses by name."""

_REPLACEMENTS: dict[type, Mapping[str, str]] = {}


def checked(*skip: str, **replacements: str) -> Callable[[type[T]], type[T]]:
    """Returns a decorator by which a dataclass checks its arguments before its `__post_init__`.

    Lists become tuples and NumPy's scalars Python's; a single dataclass stands for a tuple of one.
    Called with arguments that are unknown, missing or of another type, the class raises a
    RecipeError that lists them. If the class has a method `wrong_values(values) -> list[str]`,
    its complaints come first in the same error.

    Args:
      skip: fields whose types the class checks itself.
      replacements: names that other libraries use, and what to write instead.

    >>> @checked(lr="learning rates belong to the stages")
    ... @dataclasses.dataclass(frozen=True)
    ... class Rule:
    ...     momentum: float = 0.0
    ...     milestones: tuple[int, ...] = ()
    >>> Rule(milestones=[2, 4])
    Rule(momentum=0.0, milestones=(2, 4))
    >>> Rule(lr=0.1, momentun="high")
    Traceback (most recent call last):
    jaxft.errors.RecipeError: Rule has no field 'lr': learning rates belong to the stages; it has \
no field 'momentun': did you mean 'momentum'?
    """

    def decorate(cls: type[T]) -> type[T]:
        CLASSES[cls.__name__] = cls
        _REPLACEMENTS[cls] = replacements
        init = cls.__init__

        @wraps(init)
        def checked_init(self: T, *args: Any, **kwargs: Any) -> None:
            init(self, **_arguments(cls, args, kwargs, skip))

        cls.__init__ = checked_init  # type: ignore[method-assign, assignment]
        return cls

    return decorate


def unknown_field_message(cls: type, name: str) -> str:
    """Returns the complaint about a name that is no field of a checked dataclass."""
    said = f"no field {name!r}"
    if hint := _REPLACEMENTS[cls].get(name):
        return f"{said}: {hint}"
    names = _names(cls)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.7)
    near += [field for field in names if field.startswith(name) or name.startswith(field)]
    if near:
        return f"{said}: did you mean {near[0]!r}?"
    if others := [other for other in ("Stage", "Recipe", "EarlyStop") if _has(other, name)]:
        return f"{said}: it is a field of {others[0]}"
    return said if len(names) > 12 else f"{said}; its fields are {', '.join(names)}"


def _names(cls: type) -> list[str]:
    return [field.name for field in _fields(cls)]


def _has(cls: str, name: str) -> bool:
    return cls in CLASSES and name in _names(CLASSES[cls])


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _arguments(
    cls: type, args: Sequence[Any], kwargs: Mapping[str, Any], skip: Sequence[str]
) -> dict[str, Any]:
    """The arguments by name, of the fields' types; RecipeError where they cannot be."""
    names = _names(cls)
    ordered = [field.name for field in _fields(cls) if not field.kw_only]
    wrong = []
    if args and "optimizer" in _REPLACEMENTS[cls] and _is_optimizer(args[0]):
        wrong.append(f"takes no optimizer: {_REPLACEMENTS[cls]['optimizer']}")
        args = args[1:]
    if len(args) > len(ordered):
        hint = _REPLACEMENTS[cls].get("lr", "") if isinstance(args[0], Real) else ""
        counted = f"takes {len(ordered) or 'no'} arguments without a name, not {len(args)}"
        wrong.append(f"{counted}: {hint}" if hint else counted)
    given = dict(zip(ordered, args, strict=False))
    wrong += [f"is given {name!r} twice" for name in kwargs if name in given]
    wrong += [f"has {unknown_field_message(cls, name)}" for name in kwargs if name not in names]
    given |= {name: value for name, value in kwargs.items() if name in names}
    given = {name: _plain(value) for name, value in given.items()}
    misfits = []
    for name, value in given.items():
        if name not in skip:
            try:
                given[name] = _fitted(value, _hints(cls)[name])
            except _MisfitError:
                shown = reprlib.repr(value)
                misfits.append(f"{name} is {shown}; it must be {_words(_hints(cls)[name])}")
    missing = [f.name for f in _fields(cls) if f.name not in given and _is_required(f)]
    if not (wrong or misfits or missing):
        return given
    label = given.get("name")
    subject = f"{cls.__name__} {label!r}" if isinstance(label, str) else cls.__name__
    said = [f"{'it' if i else subject} {predicate}" for i, predicate in enumerate(wrong)]
    rest = [*misfits, *([f"{', '.join(missing)} must be given"] if missing else [])]
    if hasattr(cls, "wrong_values"):
        bad = {misfit.split(" is ")[0] for misfit in misfits}
        rest[:0] = cls.wrong_values({n: x for n, x in given.items() if n not in bad})
    if rest and not said:
        rest[0] = f"{subject}: {rest[0]}"
    message = "; ".join([*said, *rest])
    raise RecipeError(message if message.endswith("?") else f"{message}.")


def _plain(value: Any) -> Any:
    """A scalar array as Python's number, alone or in a dict; anything else as it is."""
    if type(value) is dict:
        return {key: _plain(x) for key, x in value.items()}
    return value.item() if hasattr(value, "item") and np.shape(value) == () else value


def _is_optimizer(value: Any) -> bool:
    """Whether it is torch's, jaxft's or optax's; by attribute, so as to import none of them."""
    return any(hasattr(value, name) for name in ("param_groups", "direction", "update"))


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


class _MisfitError(Exception):
    pass


def _fitted(value: Any, hint: Any) -> Any:
    """The value as the type hint has it; anything for hints that are not known here."""
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return _first_fitted(value, args)
    if kind is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in args):
            raise _MisfitError
        return value
    if kind is tuple:
        return _fitted_tuple(value, args)
    if hint is int and isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    if hint is float and isinstance(value, Real) and not isinstance(value, bool):
        return value.item() if isinstance(value, np.generic) else value
    if hint is bool and isinstance(value, bool | np.bool_):
        return bool(value)
    if hint is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    expected = kind or hint
    if expected in (int, float, bool) or (
        isinstance(expected, type) and not isinstance(value, expected)
    ):
        raise _MisfitError
    return value


def _first_fitted(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return _fitted(value, hint)
        except _MisfitError:
            continue
    raise _MisfitError


def _fitted_tuple(value: Any, hints: Sequence[Any]) -> tuple[Any, ...]:
    if dataclasses.is_dataclass(hints[0]) and isinstance(value, hints[0]):  # type: ignore[arg-type]
        return (value,)
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        raise _MisfitError
    if hints[-1] is Ellipsis:
        hints = [hints[0]] * len(value)
    if len(hints) != len(value):
        raise _MisfitError
    return tuple(map(_fitted, value, hints))


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    type(None): "None",
    Mapping: "a mapping such as {'fc': 1e-3}",
}


def _words(hint: Any) -> str:
    """The type in a sentence."""
    *most, last = _alternatives(hint)
    return f"{', '.join(most)} or {last}" if most else last


def _alternatives(hint: Any) -> list[str]:
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return [word for arg in args for word in _alternatives(arg)]
    if kind is Literal:
        return [repr(choice) for choice in args]
    if kind is tuple:
        each = _words(args[0])
        if not isinstance(args[0], type):
            return [f"a tuple, each {each}"]
        many = "a tuple of" if args[-1] is Ellipsis else f"{len(args)}"
        return [f"{many} {each.removeprefix('a ')}s"]
    word = _WORDS.get(kind or hint)
    return [str(getattr(hint, "__name__", hint)) if word is None else word]
