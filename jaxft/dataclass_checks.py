"""Dataclasses that check the names and types of their arguments and report all errors at once.

Plain Python raises a TypeError at the first unknown name and checks no types.
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
"""All checked dataclasses by name."""

_HINTS_BY_NAME: dict[type, Mapping[str, str]] = {}
"""Hint for each argument name of other libraries, by class."""


def checked(*skip: str, **hints: str) -> Callable[[type[T]], type[T]]:
    """Returns a class decorator that checks arguments before `__post_init__` runs.

    Lists become tuples, NumPy scalars become Python scalars, and a single dataclass becomes a tuple
    where a field holds a tuple of them. Unknown, missing and mistyped arguments raise one
    RecipeError that lists them all. If the class has a method `wrong_values(values) -> list[str]`,
    its messages come first in the same error.

    Args:
      *skip: fields whose types the class checks itself.
      **hints: argument names of other libraries, each with its equivalent here.

    Example:
      >>> @checked(lr="learning rates belong to the stages, Stage(..., train={'fc': 1e-3})")
      ... @dataclasses.dataclass(frozen=True)
      ... class Rule:
      ...     momentum: float = 0.0
      ...     milestones: tuple[int, ...] = ()
      >>> Rule(milestones=[2, 4])
      Rule(momentum=0.0, milestones=(2, 4))
      >>> Rule(momentun="high")
      Traceback (most recent call last):
      jaxft.errors.RecipeError: Rule has no field 'momentun': did you mean 'momentum'?
    """

    def decorate(cls: type[T]) -> type[T]:
        CLASSES[cls.__name__] = cls
        _HINTS_BY_NAME[cls] = hints
        init = cls.__init__

        @wraps(init)
        def checked_init(self: T, *args: Any, **kwargs: Any) -> None:
            init(self, **_arguments(cls, args, kwargs, skip))

        cls.__init__ = checked_init  # type: ignore[method-assign, assignment]
        return cls

    return decorate


def unknown_field_message(cls: type, name: str) -> str:
    """Returns an error message for a name that is no field of a checked dataclass."""
    message = f"no field {name!r}"
    if hint := _HINTS_BY_NAME[cls].get(name):
        return f"{message}: {hint}"
    names = _names(cls)
    similar = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.7)
    similar += [field for field in names if field.startswith(name) or name.startswith(field)]
    if similar:
        return f"{message}: did you mean {similar[0]!r}?"
    if owners := [owner for owner in ("Stage", "Recipe", "EarlyStop") if _has(owner, name)]:
        return f"{message}: it is a field of {owners[0]}"
    return message if len(names) > 12 else f"{message}; its fields are {', '.join(names)}"


def _names(cls: type) -> list[str]:
    return [field.name for field in _fields(cls)]


def _has(class_name: str, field: str) -> bool:
    return class_name in CLASSES and field in _names(CLASSES[class_name])


def _fields(cls: type) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(cls) if field.init]


@cache
def _type_hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _arguments(
    cls: type, args: Sequence[Any], kwargs: Mapping[str, Any], skip: Sequence[str]
) -> dict[str, Any]:
    """Returns the arguments by name, converted to the types of their fields.

    Raises:
      RecipeError: arguments are unknown, missing or of a wrong type.
    """
    names = _names(cls)
    positional = [field.name for field in _fields(cls) if not field.kw_only]
    errors = []  # predicates of the class: "has no field ..."
    if args and "optimizer" in _HINTS_BY_NAME[cls] and _is_optimizer(args[0]):
        errors.append(f"takes no optimizer: {_HINTS_BY_NAME[cls]['optimizer']}")
        args = args[1:]
    if len(args) > len(positional):
        hint = _HINTS_BY_NAME[cls].get("lr", "") if isinstance(args[0], Real) else ""
        error = f"takes {len(positional) or 'no'} arguments without a name, not {len(args)}"
        errors.append(f"{error}: {hint}" if hint else error)
    values = dict(zip(positional, args, strict=False))
    errors += [f"is given {name!r} twice" for name in kwargs if name in values]
    errors += [f"has {unknown_field_message(cls, name)}" for name in kwargs if name not in names]
    values |= {name: value for name, value in kwargs.items() if name in names}
    values = {name: _without_numpy_scalars(value) for name, value in values.items()}
    type_errors = {}
    for name, value in values.items():
        if name not in skip:
            try:
                values[name] = _convert(value, _type_hints(cls)[name])
            except _WrongTypeError:
                text, expected = reprlib.repr(value), _description(_type_hints(cls)[name])
                type_errors[name] = f"{name} is {text}; it must be {expected}"
    missing = [f.name for f in _fields(cls) if f.name not in values and _is_required(f)]
    if not (errors or type_errors or missing):
        return values
    label = values.get("name")
    subject = f"{cls.__name__} {label!r}" if isinstance(label, str) else cls.__name__
    sentences = [f"{'it' if i else subject} {error}" for i, error in enumerate(errors)]
    details = [*type_errors.values()]
    if missing:
        details.append(f"{', '.join(missing)} must be given")
    if hasattr(cls, "wrong_values"):
        typed = {name: value for name, value in values.items() if name not in type_errors}
        details[:0] = cls.wrong_values(typed)
    if details and not sentences:
        details[0] = f"{subject}: {details[0]}"
    message = "; ".join([*sentences, *details])
    raise RecipeError(message if message.endswith("?") else f"{message}.")


def _without_numpy_scalars(value: Any) -> Any:
    """Converts a scalar array to a Python scalar, also within a dict."""
    if type(value) is dict:
        return {key: _without_numpy_scalars(x) for key, x in value.items()}
    return value.item() if hasattr(value, "item") and np.shape(value) == () else value


def _is_optimizer(value: Any) -> bool:
    """Returns True for an optimizer of torch, jaxft or optax; imports none of them."""
    return any(hasattr(value, name) for name in ("param_groups", "direction", "update"))


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


class _WrongTypeError(Exception):
    pass


def _convert(value: Any, hint: Any) -> Any:
    """Converts a value to the type of a hint; raises _WrongTypeError if it cannot.

    Accepts any value for hints that it does not know.
    """
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return _convert_to_any(value, args)
    if kind is Literal:
        if not any(value == choice and type(value) is type(choice) for choice in args):
            raise _WrongTypeError
        return value
    if kind is tuple:
        return _convert_tuple(value, args)
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
        raise _WrongTypeError
    return value


def _convert_to_any(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint)
        except _WrongTypeError:
            continue
    raise _WrongTypeError


def _convert_tuple(value: Any, hints: Sequence[Any]) -> tuple[Any, ...]:
    if dataclasses.is_dataclass(hints[0]) and isinstance(value, hints[0]):  # type: ignore[arg-type]
        return (value,)
    if isinstance(value, str) or not isinstance(value, Sequence | np.ndarray):
        raise _WrongTypeError
    if hints[-1] is Ellipsis:
        hints = [hints[0]] * len(value)
    if len(hints) != len(value):
        raise _WrongTypeError
    return tuple(map(_convert, value, hints))


_DESCRIPTIONS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    type(None): "None",
    Mapping: "a mapping such as {'fc': 1e-3}",
}


def _description(hint: Any) -> str:
    """Returns the type as words of an error message."""
    *most, last = _alternatives(hint)
    return f"{', '.join(most)} or {last}" if most else last


def _alternatives(hint: Any) -> list[str]:
    kind, args = get_origin(hint), get_args(hint)
    if kind in (Union, types.UnionType):
        return [text for arg in args for text in _alternatives(arg)]
    if kind is Literal:
        return [repr(choice) for choice in args]
    if kind is tuple:
        element = _description(args[0])
        if not isinstance(args[0], type):
            return [f"a tuple, each {element}"]
        start = "a tuple of" if args[-1] is Ellipsis else f"{len(args)}"
        return [f"{start} {element.removeprefix('a ')}s"]
    return [_DESCRIPTIONS.get(kind or hint) or str(getattr(hint, "__name__", hint))]
