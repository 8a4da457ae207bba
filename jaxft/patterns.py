"""Patterns that select parameters by their dotted path, and hints for patterns that match nothing.

`jaxft.labels` applies them to a tree of parameters.
"""

import difflib
import glob
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from string import digits
from typing import TYPE_CHECKING, Any, TypeAlias

from jaxft.errors import PatternError, first_of

Pattern = str | re.Pattern[str] | Callable[[str, Any], bool]
"""Selects parameters by their path.

- A string is matched segment by segment from the root and covers everything below: `layer4` is all
  of layer4 and `*` is everything. `layer*.0` and `layer[12]` glob within a segment, `**` stands for
  any number of segments: `**.bn*`, and `blocks[2:]` for the items of a list from `blocks.2` on.
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
_SLICE = re.compile(r"(.+)\[(\d*):(\d*)\]")
_LAYER = re.compile(r"(?P<stack>.+?)\.(?P<index>\d*)(\.|$)")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "mean", "var")


def matcher(pattern: Pattern) -> Callable[[str, Any], bool]:
    """Returns the predicate `(path, leaf) -> bool` of a pattern.

    Raises:
      PatternError: the pattern has an empty segment, or is of an unknown type.
    """
    if isinstance(pattern, str):
        segments = _segments(pattern)
        if "" in segments:
            raise PatternError(
                f"pattern {pattern!r} has an empty segment; '*' is everything. For a regular "
                f"expression, pass re.compile({pattern!r})."
            )
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
            guess = f"Did you mean {' or '.join(suggestions)}?  "
        elif pattern.split(".")[-1] in _STATISTICS:
            guess = "Running statistics are no parameters; see `norms` of a stage.  "
    counts = Counter(roots_of(paths))
    entries = [root if root in paths else f"{root}.* ({counts[root]})" for root in counts]
    parameters = "  ".join(first_of(entries, 12, "... and {} more")) or "none"
    return (
        f"pattern {pattern_text(pattern)!r} matches no parameter.\n"
        f"  {guess}Parameters: {parameters}"
    )


def stack_hint(pattern: Pattern, shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns a line for a pattern that looks like a layer of stacked parameters, else "".

    Args:
      pattern: a pattern that matches nothing, such as `blocks.3` or `blocks[2:].attn`.
      shapes: shape of each parameter by its path.
    """
    if not isinstance(pattern, str):
        return ""
    layer = _LAYER.match(re.sub(r"\[(\d*):?\d*\]", r".\1", pattern))
    if not layer:
        return ""
    stack, index = layer["stack"], int(layer["index"] or 0)
    below = {shape[:1] for path, shape in shapes.items() if path.startswith(f"{stack}.")}
    counts = {count for dimensions in below for count in dimensions or (0,)}
    if len(counts) != 1 or index >= (count := counts.pop()):
        return ""
    return (
        f"\n  If the arrays of {stack!r} stack {count} layers on their first axis, pass "
        f"jaxft.unstack(params, {stack!r}): it has a leaf for each layer, {stack}.{index}.*"
    )


def roots_of(paths: Sequence[str]) -> list[str]:
    """Returns the first segment of each path, and all segments before it that all paths share.

    Example:
      >>> roots_of(["params.conv.kernel", "params.fc.kernel", "params.fc.bias"])
      ['params.conv', 'params.fc', 'params.fc']
    """
    depth = len(_common_root(paths)) + 1
    return [".".join(path.split(".")[:depth]) for path in paths]


def _common_root(paths: Sequence[str]) -> list[str]:
    """Returns the segments above the first branch of a tree."""
    parents = [path.split(".")[:-1] for path in paths]
    shared = takewhile(lambda names: len(set(names)) == 1, zip(*parents, strict=False))
    return [names[0] for names in shared]


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


def _segments(pattern: str) -> list[str | range]:
    """Splits a string pattern; `blocks[2:6]` becomes `blocks` and a range of indices."""
    segments: list[str | range] = []
    for segment in pattern.split("."):
        if match := _SLICE.fullmatch(segment):
            name, start, stop = match.groups()
            segments += [name, range(int(start or 0), int(stop or sys.maxsize))]
        else:
            segments.append(segment)
    return segments


def _covers(pattern: Sequence[str | range], path: Sequence[str]) -> bool:
    """Returns True if the pattern's segments match the path's first segments."""
    if not pattern:
        return True
    first, *rest = pattern
    if first == "**":
        return any(_covers(rest, path[i:]) for i in range(len(path) + 1))
    return bool(path) and _matches(first, path[0]) and _covers(rest, path[1:])


def _matches(pattern: str | range, segment: str) -> bool:
    if isinstance(pattern, range):
        return segment.isdecimal() and int(segment) in pattern
    return fnmatchcase(segment, pattern)


def _suggestions(pattern: str, paths: Sequence[str]) -> list[str]:
    """Returns alternatives to a pattern that matches nothing, as code; each matches some path."""
    if matches_any(escaped := escape(pattern), paths):
        return [repr(escaped)]
    if regex := _as_regex(pattern, paths):
        return [f"re.compile({regex!r})"]
    # Slashes, PyTorch's indices, a leading `params` or `model`, and other names of parameters.
    dotted = re.sub(r"\[(\d+)\]", r".\1", pattern.replace("/", ".")).strip(".")
    for form in (dotted, dotted.partition(".")[2]):
        if matching := [name for name in _in_flax(form) if matches_any(name, paths)]:
            return [repr(name) for name in matching]
    for name in _in_flax(dotted):
        parents = _parents(name, paths)
        if "params" in parents:
            return [repr(f"params.{name}"), "to pass params['params']"]
        if parents:
            return [repr(f"{escape(parents[0]) if len(parents) == 1 else '**'}.{name}")]
    root = [escape(segment) for segment in _common_root(paths)]
    for start in ([], root):
        if sibling := _sibling([*start, *dotted.split(".")], paths):
            return [repr(sibling)]
    split = [path.split(".") for path in paths]
    prefixes = dict.fromkeys(".".join(s[: i + 1]) for s in split for i in range(len(s)))
    return [repr(escape(name)) for name in difflib.get_close_matches(pattern, prefixes, n=1)]


def _in_flax(pattern: str) -> list[str]:
    """Returns a pattern, and its forms with Flax's names of the parameter."""
    *parents, last = pattern.split(".")
    return [".".join([*parents, name]) for name in (last, *_FLAX_NAMES.get(last, ()))]


def _as_regex(pattern: str, paths: Sequence[str]) -> str | None:
    """Returns the regular expression that a string was meant to be, if it matches any path."""
    if not set(pattern) & set("(|)\\+^$"):
        return None
    for regex in (pattern, rf"{pattern}\..*", rf".*\.{pattern}\..*"):
        try:
            if any(re.fullmatch(regex, path) for path in paths):
                return regex
        except re.error:
            return None
    return None


def _parents(pattern: str, paths: Sequence[str]) -> list[str]:
    """Returns the paths below which a pattern would match."""
    segments = _segments(pattern)
    parents: dict[str, None] = {}
    for path in paths:
        names = path.split(".")
        depths = (i for i in range(len(names)) if _covers(segments, names[i:]))
        if (depth := next(depths, None)) is not None:
            parents[".".join(names[:depth])] = None
    return list(parents)


def _sibling(segments: Sequence[str], paths: Sequence[str]) -> str | None:
    """Replaces the first segment of a pattern that matches nothing by the most similar name."""
    rest = [path.split(".") for path in paths]
    for i, segment in enumerate(segments):
        rest = [path for path in rest if len(path) > i]
        below = [path for path in rest if fnmatchcase(path[i], segment)]
        if below:
            rest = below
            continue
        if name := _closest(segment, sorted({path[i] for path in rest})):
            parent = [*segments[:i], escape(name)]
            candidates = [".".join([*parent, *segments[i + 1 :]]), ".".join(parent)]
            return next(candidate for candidate in candidates if matches_any(candidate, paths))
        return None
    return None


def _closest(segment: str, names: Sequence[str]) -> str | None:
    """Returns the most similar name; for `layer5` the layer with the closest number."""
    stem = segment.rstrip(digits)
    numbers = [name[len(stem) :] for name in names if name.rstrip(digits) == stem != name]
    if stem != segment and numbers:
        number = int(segment[len(stem) :])
        return stem + min(numbers, key=lambda other: abs(int(other) - number))
    return next(iter(difflib.get_close_matches(segment, names, n=1)), None)
