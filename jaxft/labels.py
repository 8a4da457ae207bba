"""Label trees: which label each parameter has, and the halves that labels divide a tree into.

A label tree has the structure of the parameters and a string at each leaf, as
`optax.multi_transform` expects. These functions work on the pytrees of any framework and import
JAX alone.
"""

import reprlib
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.errors import LabelError, PatternError, first_of
from jaxft.patterns import (
    Pattern,
    PatternKey,
    matcher,
    pattern_text,
    roots_of,
    shallow_warnings,
    stack_hint,
    unmatched_message,
)
from jaxft.tree_paths import alias_warnings, can_train, check_ties, dotted, is_none, leaves_of

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
    return [leaf.path for leaf in leaves_of(params) if leaf.value is not None]


def label(
    params: Tree,
    rules: Mapping[PatternKey, str] | Iterable[tuple[Pattern, str]],
    *,
    default: str = FROZEN,
) -> Tree:
    """Labels each parameter with the label of the first pattern that matches it.

    Leaves that are no parameters are always frozen: functions, numbers, arrays of integers or keys,
    and the batch statistics, caches and random states of NNX.

    Warns about a pattern such as `*.bias` where `**.bias` selects more, and about an array at two
    paths that get different labels.

    Args:
      params: any pytree; only its structure, paths and dtypes are read (a predicate also sees the
        leaves).
      rules: pattern to label, in order of precedence: a mapping or pairs.
      default: label of the parameters that no pattern matches.

    Returns:
      A tree with the structure of `params` and a label at each leaf.

    Raises:
      PatternError: a pattern matches nothing, or only parameters that earlier patterns match.
      LabelError: `rules` is no mapping, a label is not a string, or an NNX module holds the same
        variable at two paths.

    Example:
      >>> import numpy as np
      >>> params = {"conv": np.zeros(2), "fc": {"kernel": np.zeros(2), "bias": np.zeros(2)}}
      >>> label(params, {"fc.bias": "bias", "fc": "head"})
      {'conv': 'frozen', 'fc': {'bias': 'bias', 'kernel': 'head'}}
    """
    pairs = rules.items() if isinstance(rules, Mapping) else rules
    pairs = list(pairs) if isinstance(pairs, Iterable) else [pairs]
    if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise LabelError(
            f"label: the rules are {reprlib.repr(rules)}; they must be a mapping of patterns to "
            "labels, such as {'fc': 'head'}."
        )
    places = [(repr(pattern_text(pattern)), name) for pattern, name in pairs]
    _check_label_types([*places, ("the default", default)])
    patterns, names = [pattern for pattern, _ in pairs], [name for _, name in pairs]
    chosen, errors = match(params, patterns)
    if errors:
        raise PatternError("\n".join(errors))
    leaves = [leaf for leaf in leaves_of(params) if leaf.value is not None]
    labels = [
        names[i] if i is not None else default if can_train(leaf) else FROZEN
        for i, leaf in zip(chosen, leaves, strict=True)
    ]
    for warning in [*shallow_warnings(patterns, paths(params)), *alias_warnings(params, labels)]:
        warnings.warn(warning, stacklevel=2)
    return unflatten(params, labels)


def match(params: Tree, patterns: Sequence[Pattern]) -> tuple[list[int | None], list[str]]:
    """Finds the first pattern that matches each leaf.

    Args:
      params: a pytree of parameters.
      patterns: patterns in order of precedence.

    Returns:
      `(chosen, errors)`: for each leaf the index of its pattern, or None; and a message for each
      pattern that matches nothing or that earlier patterns shadow completely.

    Raises:
      LabelError: an NNX module holds the same variable at two paths.
    """
    check_ties(params)
    leaves = [leaf for leaf in leaves_of(params) if leaf.value is not None]
    trains = [can_train(leaf) for leaf in leaves]
    hits = [
        [x and matches(leaf.path, leaf.value) for x, leaf in zip(trains, leaves, strict=True)]
        for matches in map(matcher, patterns)
    ]
    chosen = [
        next((i for i, row in enumerate(hits) if row[leaf]), None) for leaf in range(len(leaves))
    ]
    errors = []
    for i, (pattern, row) in enumerate(zip(patterns, hits, strict=True)):
        if not any(row):
            shapes = {
                leaf.path: np.shape(leaf.value) for x, leaf in zip(trains, leaves, strict=True) if x
            }
            constants = [
                f"{leaf.path} ({type(leaf.value if leaf.box is None else leaf.box).__name__})"
                for leaf in leaves
                if not callable(pattern) and matcher(pattern)(leaf.path, leaf.value)
            ]
            errors.append(
                f"pattern {pattern_text(pattern)!r} matches only leaves that never train: "
                f"{_listed(constants)}."
                if constants
                else unmatched_message(pattern, list(shapes)) + stack_hint(pattern, shapes)
            )
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
      LabelError: the labels do not fit the parameters, or an NNX module holds the same variable at
        two paths.

    Example:
      >>> partition({"conv": 1.0, "fc": 2.0}, {"conv": "frozen", "fc": "head"})
      ({'conv': None, 'fc': 2.0}, {'conv': 1.0, 'fc': None})
    """
    check_ties(params)
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
                f"{dotted(path)} is held by {len(values)} parts; parts must not overlap."
            )
        return values[0] if values else None

    return jax.tree_util.tree_map_with_path(pick, *parts, is_leaf=is_none)


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
        is_leaf=is_none,
    )


def leaf_labels(params: Tree, labels: Tree) -> list[str]:
    """Returns the label of each leaf of `params`, in leaf order.

    Raises:
      LabelError: the labels do not fit the parameters, see `labels_like`.
    """
    leaves = jax.tree.leaves(params, is_leaf=is_none)
    names = jax.tree.leaves(labels_like(params, labels))
    return [name for name, leaf in zip(names, leaves, strict=True) if leaf is not None]


def labels_like(params: Tree, labels: Tree) -> Tree:
    """Returns the labels in the containers of `params`; a leaf that is None also gets one.

    Labels of an NNX module also serve its state and its pure state, and those of all parameters
    serve a tree without the frozen ones: where the structures differ, labels are matched by path.

    Raises:
      LabelError: a parameter has no label, a label other than `frozen` has no parameter, or a label
        is not a string.
    """
    values, structure = jax.tree.flatten(params, is_leaf=is_none)
    names, label_structure = jax.tree.flatten(labels, is_leaf=is_none)
    extra: list[str] = []
    if label_structure != structure:  # type: ignore[operator]
        # By position otherwise: Haiku's a/b and a/~/b share a path.
        names, extra = _names_by_path(params, labels, names)
    unlabelled, wrong = [], []
    pairs = enumerate(zip(values, names, strict=True))
    irregular = [i for i, (x, n) in pairs if type(n) is not str or (x is None and n != FROZEN)]
    leaves = leaves_of(params) if irregular else []
    for i in irregular:
        path, name = leaves[i].path, names[i]
        if name is None and (leaves[i].value is None or not can_train(leaves[i])):
            names[i] = FROZEN
        elif name is None:
            unlabelled.append(path)
        elif leaves[i].value is None and name != FROZEN:
            extra.append(path)
        else:
            wrong.append((path, name))
    if unlabelled or extra:
        raise LabelError(
            "the label tree has another structure than the parameters"
            + (f"; without a label: {_listed(unlabelled, 'a bare array')}" if unlabelled else "")
            + (f"; labels of no parameter: {_listed(extra, 'a bare label')}" if extra else "")
            + ". Build it with jaxft.label(params, ...)."
        )
    _check_label_types(wrong)
    return jax.tree.unflatten(structure, names)


def _names_by_path(params: Tree, labels: Tree, names: list[Any]) -> tuple[list[Any], list[str]]:
    """Returns the label of each leaf by its path, and the paths of trainable labels left over."""
    leaf_paths, label_paths = ([leaf.path for leaf in leaves_of(tree)] for tree in (params, labels))
    counts = Counter(leaf_paths) | Counter(label_paths)
    if shared := [path for path, count in counts.items() if count > 1]:
        raise LabelError(
            "the label tree has another structure than the parameters, and several leaves share "
            f"the path {_listed(shared)}. Build it with jaxft.label(params, ...)."
        )
    by_path = dict(zip(label_paths, names, strict=True))
    names = [by_path.pop(path, None) for path in leaf_paths]
    return names, [path for path, name in by_path.items() if name not in (None, FROZEN)]


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
    roots = roots_of(paths(params))
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


def _check_label_types(names: Iterable[tuple[str, Any]]) -> None:
    wrong = [f"{reprlib.repr(name)} for {place}" for place, name in names if type(name) is not str]
    if wrong:
        raise LabelError(f"labels must be strings, not {_listed(wrong)}.")


def _listed(entries: Iterable[str], bare: str = "") -> str:
    """Joins the first entries; an empty path is shown as `bare`."""
    return ", ".join(first_of([entry or bare for entry in entries], 5, "... and {} more"))
