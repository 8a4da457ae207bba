"""Patterns that select parameters by their dotted path, and hints for patterns that match nothing.

`jaxft.labels` applies them to a tree of parameters.
"""

import difflib
import glob
import re
from collections import Counter
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxft.errors import PatternError, first_of

Pattern = str | re.Pattern[str] | Callable[[str, Any], bool]
"""Selects parameters by their path.

- A string is matched segment by segment from the root and covers everything below: `layer4` is all
  of layer4 and `*` is everything. `layer*.0` and `layer[12]` glob within a segment, and `**`
  stands for any number of segments: `**.bn*`.
- A compiled regular expression must match the whole path.
- A predicate receives `(path, leaf)` and returns a bool.
"""

# The keys of a mapping are invariant: a type checker would not accept a dict[str, float] as a
# Mapping[Pattern, float].
if TYPE_CHECKING:
    PatternKey: TypeAlias = Any
else:
    PatternKey = Pattern

# The names of parameters in other libraries, and their names in Flax.
_FLAX_NAMES = {"weight": ("kernel", "scale", "embedding"), "gamma": ("scale",), "beta": ("bias",)}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "mean", "var")


def matcher(pattern: Pattern) -> Callable[[str, Any], bool]:
    """Returns the predicate `(path, leaf) -> bool` of a pattern.

    Raises:
      PatternError: the pattern has an empty segment, or is of an unknown type.
    """
    if isinstance(pattern, str):
        segments = pattern.split(".")
        if "" in segments:
            raise PatternError(f"pattern {pattern!r} has an empty segment; '*' is everything.")
        return lambda path, _: _covers(segments, path.split("."))
    if isinstance(pattern, re.Pattern):
        return lambda path, _: pattern.fullmatch(path) is not None
    if callable(pattern):
        return pattern
    raise PatternError(
        f"{pattern!r} is no pattern: it must be a string, a compiled regular expression or a "
        "predicate (path, leaf) -> bool."
    )


def matches_any(pattern: str, paths: Sequence[str]) -> bool:
    """Returns True if a string pattern matches any path; an empty segment matches none."""
    return "" not in pattern.split(".") and any(map(matcher(pattern), paths, paths))


def escape(path: str) -> str:
    """Returns the pattern that matches a path literally, e.g. `layers[[]0]` for `layers[0]`."""
    return glob.escape(path)


def pattern_text(pattern: Pattern) -> str:
    """Returns a pattern as text for messages and group names."""
    if isinstance(pattern, str):
        return pattern
    if isinstance(pattern, re.Pattern):
        return pattern.pattern
    return getattr(pattern, "__name__", repr(pattern))  # a functools.partial has no name


def unmatched_message(pattern: Pattern, paths: Sequence[str]) -> str:
    """Returns the error message for a pattern that matches none of the paths.

    It suggests patterns that match, and lists the roots of the paths.
    """
    guess = ""
    if isinstance(pattern, str):
        if suggestions := _suggestions(pattern, paths):
            guess = f"Did you mean {' or '.join(map(repr, suggestions))}?  "
        elif pattern.split(".")[-1] in _STATISTICS:
            guess = "Running statistics are no parameters; see `norms` of a stage.  "
    roots = Counter(path.split(".")[0] for path in paths)
    entries = [f"{root}.* ({count})" for root, count in roots.items()]
    parameters = "  ".join(first_of(entries, 12, "... and {} more")) or "none"
    return (
        f"pattern {pattern_text(pattern)!r} matches no parameter.\n"
        f"  {guess}Parameters: {parameters}"
    )


def shallow_warnings(patterns: Sequence[Pattern], paths: Sequence[str]) -> list[str]:
    """Returns a warning for each pattern such as `*.bias` where `**.bias` selects more.

    `*.bias` selects `fc.bias` but not `layer1.0.bias`. Patterns of whole blocks such as `layer4.*`
    cause no warning, nor do those whose deeper form is among the patterns.
    """
    warnings = []
    for pattern in patterns:
        if not (isinstance(pattern, str) and pattern.startswith("*.")):
            continue
        deep_pattern, last = f"*{pattern}", pattern.split(".")[-1]
        if last in ("*", "**") or not any(fnmatchcase(p.split(".")[-1], last) for p in paths):
            continue
        shallow, deep = (
            sum(matcher(either)(path, None) for path in paths) for either in (pattern, deep_pattern)
        )
        if shallow < deep and deep_pattern not in patterns:
            warnings.append(
                f"pattern {pattern!r} selects {shallow} of the {deep} parameters that "
                f"{deep_pattern!r} selects: '*' is one segment of a path, '**' any number."
            )
    return warnings


def _covers(pattern: list[str], path: list[str]) -> bool:
    """Returns True if the pattern's segments match the path's first segments."""
    if not pattern:
        return True
    first, *rest = pattern
    if first == "**":
        return any(_covers(rest, path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], first) and _covers(rest, path[1:])


def _suggestions(pattern: str, paths: Sequence[str]) -> list[str]:
    """Returns patterns similar to one that matches nothing; each matches some path."""
    if matches_any(escaped := escape(pattern), paths):
        return [escaped]
    # Slashes, PyTorch's indices, a leading `params` or `model`, and other names of parameters.
    dotted = re.sub(r"\[(\d+)\]", r".\1", pattern.replace("/", ".")).strip(".")
    for form in dict.fromkeys([dotted, dotted.partition(".")[2]]):
        *parents, last = form.split(".")
        candidates = [".".join([*parents, name]) for name in (last, *_FLAX_NAMES.get(last, ()))]
        if matching := [candidate for candidate in candidates if matches_any(candidate, paths)]:
            return matching
    segments = [path.split(".") for path in paths]
    prefixes = dict.fromkeys(".".join(s[: i + 1]) for s in segments for i in range(len(s)))
    return [escape(name) for name in difflib.get_close_matches(pattern, prefixes, n=1)]
