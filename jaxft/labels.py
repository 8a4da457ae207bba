"""Label trees: patterns over parameter paths, and the two halves a label tree cuts.

A label tree has the structure of the parameters and a string at each leaf, as
`optax.multi_transform` takes it. Works on any pytree of any framework and imports jax alone.
"""

import difflib
import glob
import re
import reprlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax

from jaxft.errors import LabelError, PatternError, first_of

Tree = Any
"""A pytree of arrays, of whatever framework."""

Pattern = str | re.Pattern[str] | Callable[[str, Any], bool]
"""Selects parameters by their path.

A string is matched segment by segment from the root and covers all below: `layer4` is all of
layer4, `*` is everything, `layer*.0` and `layer[12]` glob within a segment, `**.bn*` any depth.
A compiled regular expression must match the whole path; a predicate gets `(path, leaf)`.
"""

FROZEN = "frozen"
"""The reserved label: no gradient, no optimizer state, bit-identical after training."""


def paths(params: Tree) -> list[str]:
    """The dotted path of each leaf, in leaf order: `layer4.0.conv1.kernel`.

    The same network has the same paths in every framework: list indices, attributes and dict
    keys are all segments, Haiku's `block/~/conv` is `block.conv`, and the boxes in which Flax
    wraps an array (`nnx.Variable`, `nn.Partitioned`) add no segment of their own.

    >>> paths({"layer1": [{"kernel": 0.0}], "fc/~/out": {"w": 0.0}})
    ['fc.out.w', 'layer1.0.kernel']
    """
    flatten = jax.tree_util.tree_flatten_with_path
    nodes, _ = flatten(params, is_leaf=_is_box)
    # A box's own key ("value") is the first below it; an array has none.
    return [_dotted(path + below[1:]) for path, node in nodes for below, _ in flatten(node)[0]]


def label(params: Tree, rules: Mapping[Pattern, str], *, default: str = FROZEN) -> Tree:
    """The label tree that gives each parameter the label of the first pattern that matches it.

    Args:
      params: any pytree; only its structure and paths are read.
      rules: pattern to label, in order of precedence.
      default: the label of what no pattern matches.

    Raises:
      PatternError: a pattern matches nothing, or only what earlier ones have taken.
      LabelError: `rules` is no mapping, or a label is not a string.

    Warns of `*.bias` and the like where `**.bias` selects more.

    >>> params = {"conv": {"kernel": 0.0}, "fc": {"kernel": 0.0, "bias": 0.0}}
    >>> label(params, {"fc.bias": "bias", "fc": "head"})
    {'conv': {'kernel': 'frozen'}, 'fc': {'bias': 'bias', 'kernel': 'head'}}
    """
    if not isinstance(rules, Mapping):
        raise LabelError(
            f"label: the rules are {reprlib.repr(rules)}; they must be a mapping of patterns to "
            "labels, such as {'fc': 'head'}."
        )
    given = [(repr(show(pattern)), name) for pattern, name in rules.items()]
    _check_names([*given, ("what no pattern matches", default)])
    chosen, complaints = match(params, list(rules))
    if complaints:
        raise PatternError("\n".join(complaints))
    for remark in shallow(params, list(rules)):
        warnings.warn(remark, stacklevel=2)
    names = list(rules.values())
    return unflatten(params, [default if i is None else names[i] for i in chosen])


def match(params: Tree, patterns: Sequence[Pattern]) -> tuple[list[int | None], list[str]]:
    """For each leaf the index of the first pattern that matches it, and what is wrong.

    Returns `(chosen, complaints)`; a complaint says which pattern matches nothing, or is wholly
    shadowed by those before it, and what may have been meant.
    """
    names = paths(params)
    leaves = jax.tree.leaves(params)
    matchers = [_matcher(pattern) for pattern in patterns]
    hits = [[matches(n, x) for n, x in zip(names, leaves, strict=True)] for matches in matchers]
    chosen = [
        next((i for i, row in enumerate(hits) if row[leaf]), None) for leaf in range(len(names))
    ]
    complaints = []
    for i, (pattern, row) in enumerate(zip(patterns, hits, strict=True)):
        if not any(row):
            complaints.append(
                f"pattern {show(pattern)!r} matches no parameter.{_hint(pattern, names)}"
            )
        elif i not in chosen:
            takers = dict.fromkeys(j for j, hit in zip(chosen, row, strict=True) if hit)
            shadow = ", ".join(repr(show(patterns[j])) for j in takers if j is not None)
            complaints.append(
                f"pattern {show(pattern)!r} is never reached: {shadow} before it takes all that it "
                "matches. Put the more specific pattern first."
            )
    return chosen, complaints


def partition(params: Tree, labels: Tree) -> tuple[Tree, Tree]:
    """Cuts `params` into `(trainable, frozen)`, each with `None` where the other has a leaf.

    Take gradients of the first half alone: then nothing that reads them (clipping, norms,
    accumulation) can bring the frozen backward pass back.

    Raises:
      LabelError: `labels` has another structure than `params`.

    >>> partition({"conv": 1.0, "fc": 2.0}, {"conv": "frozen", "fc": "head"})
    ({'conv': None, 'fc': 2.0}, {'conv': 1.0, 'fc': None})
    """
    frozen = [name == FROZEN for name in leaf_labels(params, labels)]
    leaves = jax.tree.leaves(params)
    halves = (
        [None if f is side else x for f, x in zip(frozen, leaves, strict=True)]
        for side in (True, False)
    )
    trainable, rest = (unflatten(params, half) for half in halves)
    return trainable, rest


def combine(*parts: Tree) -> Tree:
    """Puts back together what `partition` cut: at each leaf the one part that is not `None`.

    Raises:
      LabelError: two parts hold the same leaf.

    >>> combine({"conv": None, "fc": 2.0}, {"conv": 1.0, "fc": None})
    {'conv': 1.0, 'fc': 2.0}
    """

    def pick(path: Any, *leaves: Any) -> Any:
        held = [leaf for leaf in leaves if leaf is not None]
        if len(held) > 1:
            raise LabelError(
                f"{_dotted(path)} is held by {len(held)} parts; parts must not overlap."
            )
        return held[0] if held else None

    return jax.tree_util.tree_map_with_path(pick, *parts, is_leaf=lambda x: x is None)


def filled(part: Tree, whole: Tree) -> Tree:
    """A part, with the leaves of `whole` where it has `None`.

    >>> filled({"conv": None, "fc": 2.0}, {"conv": 1.0, "fc": 0.0})
    {'conv': 1.0, 'fc': 2.0}
    """
    return jax.tree.map(
        lambda own, other: other if own is None else own, part, whole, is_leaf=lambda x: x is None
    )


def leaf_labels(params: Tree, labels: Tree) -> list[str]:
    """The label of each leaf of `params`, in leaf order.

    Raises:
      LabelError: `labels` has another structure than `params`, or a label is not a string.
    """
    expected, found = paths(params), paths(labels)
    wanted, given = set(expected), set(found)
    missing = [path or "a bare array" for path in expected if path not in given]
    extra = [path or "a bare label" for path in found if path not in wanted]
    if missing or extra or not same_structure(labels, params):
        raise LabelError(
            "the label tree has another structure than the parameters"
            + (f"; without a label: {_some(missing)}" if missing else "")
            + (f"; labels of no parameter: {_some(extra)}" if extra else "")
            + ("" if missing or extra else "; its containers are of other types")
            + ". Build it with jaxft.label(params, ...)."
        )
    names = jax.tree.leaves(labels)  # by position: Haiku's a/b and a/~/b share a path
    _check_names(zip(expected, names, strict=True))
    return names


def summary(params: Tree, labels: Tree) -> str:
    """A table of the labels: how many parameters each has, their share, and where they are.

    >>> import numpy as np
    >>> params = {"conv": {"kernel": np.zeros((3, 3))}, "fc": {"bias": np.zeros(3)}}
    >>> print(summary(params, label(params, {"fc": "head"})))
    label   tensors  parameters   share  where
    head          1           3   25.0%  fc
    frozen        1           9   75.0%  conv
    total         2          12  100.0%
    """
    names, sizes = leaf_labels(params, labels), [_size(x) for x in jax.tree.leaves(params)]
    roots = [path.split(".")[0] for path in paths(params)]
    total = sum(sizes)
    order = sorted(dict.fromkeys(names), key=lambda name: name == FROZEN)
    rows = [("label", "tensors", "parameters", "share", "where")]
    for name in [*order, "total"]:
        mine = [i for i, other in enumerate(names) if name in (other, "total")]
        count = sum(sizes[i] for i in mine)
        where = "" if name == "total" else " ".join(dict.fromkeys(roots[i] for i in mine))
        rows.append((name, f"{len(mine):,}", f"{count:,}", f"{count / max(total, 1):.1%}", where))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {where}".rstrip()
        for a, b, c, d, where in rows
    )


def unflatten(params: Tree, leaves: Sequence[Any]) -> Tree:
    """A tree of the parameters' structure with other leaves."""
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def same_structure(a: Tree, b: Tree) -> bool:
    """Whether two trees have the same containers with the same keys."""
    return bool(jax.tree.structure(a) == jax.tree.structure(b))  # type: ignore[operator]


def show(pattern: Pattern) -> str:
    """A pattern in the user's own words."""
    if isinstance(pattern, str):
        return pattern
    if isinstance(pattern, re.Pattern):
        return pattern.pattern
    return getattr(pattern, "__name__", repr(pattern))  # a functools.partial has no name


def _check_names(given: Iterable[tuple[str, Any]]) -> None:
    wrong = [f"{reprlib.repr(name)} for {place}" for place, name in given if type(name) is not str]
    if wrong:
        raise LabelError(f"labels must be strings, not {_some(wrong)}.")


def _dotted(path: tuple[Any, ...]) -> str:
    segments = []
    for key in path:
        # DictKey and FlattenedIndexKey have a key, SequenceKey an idx, GetAttrKey a name; a
        # container of the user's own may have anything.
        name = next((getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)), key)
        segments += [part for part in str(name).split("/") if part != "~"]  # Haiku's module names
    return ".".join(segments)


def _is_box(node: Any) -> bool:
    """Whether a node is one parameter in Flax's wrapping; by name, so as not to import Flax."""
    return any(
        base.__name__ in ("Variable", "AxisMetadata") and base.__module__.startswith("flax.")
        for base in type(node).__mro__
    )


def _matcher(pattern: Pattern) -> Callable[[str, Any], bool]:
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


def _covers(pattern: list[str], path: list[str]) -> bool:
    """Whether the pattern's segments match the path's from the root; what is below is covered."""
    if not pattern:
        return True
    first, *rest = pattern
    if first == "**":
        return any(_covers(rest, path[i:]) for i in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], first) and _covers(rest, path[1:])


# What other libraries call the parameters of a layer, and what Flax does.
_FLAX_NAMES = {"weight": ("kernel", "scale", "embedding"), "gamma": ("scale",), "beta": ("bias",)}
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked", "mean", "var")


def _hint(pattern: Pattern, names: Sequence[str]) -> str:
    """Patterns that may have been meant by one that matches nothing, and what there is to match."""
    segments = [name.split(".") for name in names]
    guess = ""
    if isinstance(pattern, str):
        if near := _meant(pattern, names):
            guess = f"Did you mean {' or '.join(map(repr, near))}?  "
        elif pattern.split(".")[-1] in _STATISTICS:
            guess = "Running statistics are no parameters; see `norms` of a stage.  "
    roots = Counter(s[0] for s in segments)
    shown = [f"{root}.* ({count})" for root, count in roots.items()]
    return f"\n  {guess}Parameters: {_some(shown, separator='  ', most=12) or 'none'}"


def _meant(pattern: str, names: Sequence[str]) -> list[str]:
    """Patterns like this one that match some parameter."""
    if matches_some(escaped := escape(pattern), names):
        return [escaped]
    # Slashes, PyTorch's indices, a leading `params` or `model`, and other names of parameters.
    dotted = re.sub(r"\[(\d+)\]", r".\1", pattern.replace("/", ".")).strip(".")
    forms = list(dict.fromkeys([dotted, dotted.partition(".")[2]]))
    for form in forms:
        *parents, last = form.split(".")
        found = [".".join([*parents, name]) for name in (last, *_FLAX_NAMES.get(last, ()))]
        if found := [form for form in found if matches_some(form, names)]:
            return found
    segments = [name.split(".") for name in names]
    prefixes = dict.fromkeys(".".join(s[: i + 1]) for s in segments for i in range(len(s)))
    return [escape(name) for name in difflib.get_close_matches(pattern, prefixes, n=1)]


def escape(path: str) -> str:
    """Returns the pattern that matches a path literally, e.g. `layers[[]0]` for `layers[0]`."""
    return glob.escape(path)


def matches_some(pattern: str, names: Sequence[str]) -> bool:
    """Whether a string pattern matches any of the paths; an empty segment matches none."""
    return "" not in pattern.split(".") and any(map(_matcher(pattern), names, names))


def shallow(params: Tree, patterns: Sequence[Pattern]) -> list[str]:
    """Returns a remark on each pattern whose `*` stands for fewer segments than may be meant.

    `*.bias` selects `fc.bias` but not `layer1.0.bias`, which `**.bias` selects too. Nothing is
    returned for patterns of whole blocks such as `layer4.*`, where `**` selects nothing more, and
    where the deeper pattern is among the patterns.
    """
    names, remarks = paths(params), []
    for pattern in patterns:
        if not (isinstance(pattern, str) and pattern.startswith("*.")):
            continue
        deeper, last = f"*{pattern}", pattern.split(".")[-1]
        if last in ("*", "**") or not any(fnmatchcase(n.split(".")[-1], last) for n in names):
            continue
        some, more = (
            [name for name in names if _matcher(p)(name, None)] for p in (pattern, deeper)
        )
        if len(some) < len(more) and deeper not in patterns:
            remarks.append(
                f"pattern {pattern!r} selects {len(some)} of the {len(more)} parameters that "
                f"{deeper!r} selects: '*' is one segment of a path, '**' any number."
            )
    return remarks


def _some(items: Sequence[str], *, separator: str = ", ", most: int = 5) -> str:
    return separator.join(first_of(items, most, "... and {} more"))


def _size(leaf: Any) -> int:
    return int(getattr(leaf, "size", 1))
