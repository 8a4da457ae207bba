"""Label trees: which label each parameter has, and the halves that labels divide a tree into.

A label tree has the structure of the parameters and a string at each leaf, as
`optax.multi_transform` expects. These functions work on the pytrees of any framework and import
JAX alone.
"""

import reprlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from jaxft.errors import LabelError, PatternError, first_of
from jaxft.patterns import (
    Pattern,
    PatternKey,
    matcher,
    pattern_text,
    shallow_warnings,
    unmatched_message,
)

Tree = Any
"""A pytree of arrays, from any framework."""

FROZEN = "frozen"
"""The reserved label: no gradient, no optimizer state, bit-identical after training."""


def paths(params: Tree) -> list[str]:
    """Returns the dotted path of each leaf, in leaf order: `layer4.0.conv1.kernel`.

    A network has the same paths in every framework. List indices, attributes and dict keys are
    segments; Haiku's `block/~/conv` becomes `block.conv`; the boxes in which Flax wraps an array
    (`nnx.Variable`, `nn.Partitioned`) add no segment.

    Example:
      >>> paths({"layer1": [{"kernel": 0.0}], "fc/~/out": {"w": 0.0}})
      ['fc.out.w', 'layer1.0.kernel']
    """
    flatten = jax.tree_util.tree_flatten_with_path
    nodes, _ = flatten(params, is_leaf=_is_box)
    # The key of a box ("value") is the first below it; an array has none.
    return [_dotted(path + below[1:]) for path, node in nodes for below, _ in flatten(node)[0]]


def label(params: Tree, rules: Mapping[PatternKey, str], *, default: str = FROZEN) -> Tree:
    """Labels each parameter with the label of the first pattern that matches it.

    Warns about a pattern such as `*.bias` where `**.bias` selects more.

    Args:
      params: any pytree; only its structure and paths are read (a predicate also sees the leaves).
      rules: pattern to label, in order of precedence.
      default: label of the parameters that no pattern matches.

    Returns:
      A tree with the structure of `params` and a label at each leaf.

    Raises:
      PatternError: a pattern matches nothing, or only parameters that earlier patterns match.
      LabelError: `rules` is no mapping, or a label is not a string.

    Example:
      >>> params = {"conv": {"kernel": 0.0}, "fc": {"kernel": 0.0, "bias": 0.0}}
      >>> label(params, {"fc.bias": "bias", "fc": "head"})
      {'conv': {'kernel': 'frozen'}, 'fc': {'bias': 'bias', 'kernel': 'head'}}
    """
    if not isinstance(rules, Mapping):
        raise LabelError(
            f"label: the rules are {reprlib.repr(rules)}; they must be a mapping of patterns to "
            "labels, such as {'fc': 'head'}."
        )
    places = [(repr(pattern_text(pattern)), name) for pattern, name in rules.items()]
    _check_label_types([*places, ("the default", default)])
    patterns, names = list(rules), list(rules.values())
    chosen, errors = match(params, patterns)
    if errors:
        raise PatternError("\n".join(errors))
    for warning in shallow_warnings(patterns, paths(params)):
        warnings.warn(warning, stacklevel=2)
    return unflatten(params, [default if i is None else names[i] for i in chosen])


def match(params: Tree, patterns: Sequence[Pattern]) -> tuple[list[int | None], list[str]]:
    """Finds the first pattern that matches each leaf.

    Args:
      params: a pytree of parameters.
      patterns: patterns in order of precedence.

    Returns:
      `(chosen, errors)`: for each leaf the index of its pattern, or None; and a message for each
      pattern that matches nothing or that earlier patterns shadow completely.
    """
    names = paths(params)
    leaves = jax.tree.leaves(params)
    hits = [
        [matches(name, leaf) for name, leaf in zip(names, leaves, strict=True)]
        for matches in map(matcher, patterns)
    ]
    chosen = [
        next((i for i, row in enumerate(hits) if row[leaf]), None) for leaf in range(len(names))
    ]
    errors = []
    for i, (pattern, row) in enumerate(zip(patterns, hits, strict=True)):
        if not any(row):
            errors.append(unmatched_message(pattern, names))
        elif i not in chosen:
            earlier = dict.fromkeys(j for j, hit in zip(chosen, row, strict=True) if hit)
            shadow = ", ".join(repr(pattern_text(patterns[j])) for j in earlier if j is not None)
            errors.append(
                f"pattern {pattern_text(pattern)!r} is never reached: {shadow} before it takes all "
                "that it matches. Put the more specific pattern first."
            )
    return chosen, errors


def partition(params: Tree, labels: Tree) -> tuple[Tree, Tree]:
    """Splits parameters into a trainable and a frozen half.

    Take gradients with respect to the trainable half alone. Then nothing that reads gradients
    (clipping, norms, accumulation) can bring back the backward pass of the frozen layers.

    Args:
      params: a pytree of parameters.
      labels: their label tree.

    Returns:
      `(trainable, frozen)`, each with None where the other half holds the leaf.

    Raises:
      LabelError: `labels` has another structure than `params`.

    Example:
      >>> partition({"conv": 1.0, "fc": 2.0}, {"conv": "frozen", "fc": "head"})
      ({'conv': None, 'fc': 2.0}, {'conv': 1.0, 'fc': None})
    """
    is_frozen = [name == FROZEN for name in leaf_labels(params, labels)]
    leaves = jax.tree.leaves(params)
    trainable, frozen = (
        unflatten(
            params, [leaf if f is side else None for f, leaf in zip(is_frozen, leaves, strict=True)]
        )
        for side in (False, True)
    )
    return trainable, frozen


def combine(*parts: Tree) -> Tree:
    """Merges the halves that `partition` returns: takes at each leaf the part that is not None.

    Raises:
      LabelError: two parts hold the same leaf.

    Example:
      >>> combine({"conv": None, "fc": 2.0}, {"conv": 1.0, "fc": None})
      {'conv': 1.0, 'fc': 2.0}
    """

    def pick(path: Any, *leaves: Any) -> Any:
        values = [leaf for leaf in leaves if leaf is not None]
        if len(values) > 1:
            raise LabelError(
                f"{_dotted(path)} is held by {len(values)} parts; parts must not overlap."
            )
        return values[0] if values else None

    return jax.tree_util.tree_map_with_path(pick, *parts, is_leaf=lambda x: x is None)


def filled(part: Tree, whole: Tree) -> Tree:
    """Replaces each None of `part` by the leaf of `whole`.

    Example:
      >>> filled({"conv": None, "fc": 2.0}, {"conv": 1.0, "fc": 0.0})
      {'conv': 1.0, 'fc': 2.0}
    """
    return jax.tree.map(
        lambda leaf, fallback: fallback if leaf is None else leaf,
        part,
        whole,
        is_leaf=lambda x: x is None,
    )


def leaf_labels(params: Tree, labels: Tree) -> list[str]:
    """Returns the label of each leaf of `params`, in leaf order.

    Raises:
      LabelError: `labels` has another structure than `params`, or a label is not a string.
    """
    param_paths, label_paths = paths(params), paths(labels)
    known, labelled = set(param_paths), set(label_paths)
    unlabelled = [path or "a bare array" for path in param_paths if path not in labelled]
    extra = [path or "a bare label" for path in label_paths if path not in known]
    if unlabelled or extra or not same_structure(labels, params):
        raise LabelError(
            "the label tree has another structure than the parameters"
            + (f"; without a label: {_listed(unlabelled)}" if unlabelled else "")
            + (f"; labels of no parameter: {_listed(extra)}" if extra else "")
            + ("" if unlabelled or extra else "; its containers are of other types")
            + ". Build it with jaxft.label(params, ...)."
        )
    names = jax.tree.leaves(labels)  # by position: Haiku's a/b and a/~/b share a path
    _check_label_types(zip(param_paths, names, strict=True))
    return names


def summary(params: Tree, labels: Tree) -> str:
    """Returns a table of the labels: number of parameters, their share, and where they are.

    Example:
      >>> import numpy as np
      >>> params = {"conv": {"kernel": np.zeros((3, 3))}, "fc": {"bias": np.zeros(3)}}
      >>> print(summary(params, label(params, {"fc": "head"})))
      label   tensors  parameters   share  where
      head          1           3   25.0%  fc
      frozen        1           9   75.0%  conv
      total         2          12  100.0%
    """
    names = leaf_labels(params, labels)
    sizes = [int(getattr(leaf, "size", 1)) for leaf in jax.tree.leaves(params)]
    roots = [path.split(".")[0] for path in paths(params)]
    total = sum(sizes)
    order = sorted(dict.fromkeys(names), key=lambda name: name == FROZEN)
    rows = [("label", "tensors", "parameters", "share", "where")]
    for name in [*order, "total"]:
        indices = [i for i, leaf_name in enumerate(names) if name in (leaf_name, "total")]
        count = sum(sizes[i] for i in indices)
        where = "" if name == "total" else " ".join(dict.fromkeys(roots[i] for i in indices))
        share = f"{count / max(total, 1):.1%}"
        rows.append((name, f"{len(indices):,}", f"{count:,}", share, where))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {where}".rstrip()
        for a, b, c, d, where in rows
    )


def unflatten(params: Tree, leaves: Sequence[Any]) -> Tree:
    """Returns a tree with the structure of `params` and the given leaves."""
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def same_structure(a: Tree, b: Tree) -> bool:
    """Returns True if two trees have the same containers with the same keys."""
    return bool(jax.tree.structure(a) == jax.tree.structure(b))  # type: ignore[operator]


def _check_label_types(names: Iterable[tuple[str, Any]]) -> None:
    wrong = [f"{reprlib.repr(name)} for {place}" for place, name in names if type(name) is not str]
    if wrong:
        raise LabelError(f"labels must be strings, not {_listed(wrong)}.")


def _dotted(path: tuple[Any, ...]) -> str:
    segments = []
    for key in path:
        # DictKey and FlattenedIndexKey have a key, SequenceKey an idx, GetAttrKey a name; the keys
        # of a user's container may be of any type.
        name = next((getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)), key)
        segments += [part for part in str(name).split("/") if part != "~"]  # Haiku's module names
    return ".".join(segments)


def _is_box(node: Any) -> bool:
    """Returns True for one parameter in a Flax wrapper; checks names, to avoid importing Flax."""
    return any(
        base.__name__ in ("Variable", "AxisMetadata") and base.__module__.startswith("flax.")
        for base in type(node).__mro__
    )


def _listed(entries: Sequence[str]) -> str:
    return ", ".join(first_of(entries, 5, "... and {} more"))
