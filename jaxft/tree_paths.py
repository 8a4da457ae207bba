"""Leaves of a pytree with their dotted paths: which of them can train, and which are tied."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft.errors import LabelError


class Leaf(NamedTuple):
    """A leaf of a pytree, its dotted path, and the Flax wrapper that holds it, or None."""

    path: str
    value: Any
    box: Any


class LayerIndex(int):
    """Index of a layer in a stacked parameter; paths have it after their first `depth` segments."""

    depth: int

    def __new__(cls, index: int, depth: int) -> "LayerIndex":
        """Returns the index with its place in a path."""
        self = super().__new__(cls, index)
        self.depth = depth
        return self


def leaves_of(params: Any) -> list[Leaf]:
    """Returns all leaves; None counts as a leaf."""
    flatten = jax.tree_util.tree_flatten_with_path
    nodes, _ = flatten(params, is_leaf=lambda node: node is None or _is_box(node))
    # The key of a box ("value") is the first below it; an array has none.
    return [
        Leaf(dotted(path + below[1:]), value, node if below else None)
        for path, node in nodes
        for below, value in flatten(node, is_leaf=is_none)[0]
    ]


def can_train(leaf: Leaf) -> bool:
    """Returns True for arrays of floats, also abstract ones, that are no state of NNX."""
    if is_flax(leaf.box, "BatchStat", "Cache", "Intermediate", "RngState"):
        return False
    dtype = getattr(leaf.value, "dtype", None)
    return dtype is not None and jax.dtypes.issubdtype(dtype, np.inexact)


def alias_warnings(params: Any, names: Sequence[Any]) -> list[str]:
    """Returns a warning for each array that is at two paths with different labels.

    Args:
      params: a pytree of parameters.
      names: the label of each leaf, in leaf order.
    """
    first: dict[int, tuple[str, Any]] = {}
    warnings = []
    leaves = [leaf for leaf in leaves_of(params) if leaf.value is not None]
    for leaf, name in zip(leaves, names, strict=True):
        if isinstance(leaf.value, jax.Array | np.ndarray):
            other_path, other_name = first.setdefault(id(leaf.value), (leaf.path, name))
            if other_name != name:
                warnings.append(
                    f"{other_path!r} and {leaf.path!r} hold the same array with different labels, "
                    f"{other_name!r} and {name!r}: each trains by its own label. To tie them, keep "
                    "the array once and let the network read it twice."
                )
    return warnings


def check_ties(params: Any) -> None:
    """Raises a LabelError if two paths lead to the same NNX variable; halves would untie them."""
    places: dict[int, list[str]] = {}
    for path, node in jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_box)[0]:
        if is_flax(node, "Variable"):
            places.setdefault(id(node), []).append(dotted(path))
    if tied := [" and ".join(map(repr, names)) for names in places.values() if len(names) > 1]:
        raise LabelError(
            f"{', '.join(tied)} are the same variable, and a pytree would hold it twice. Use "
            "nnx.state(module, nnx.Param), which holds it once, and nnx.merge or nnx.update."
        )


def dotted(path: tuple[Any, ...]) -> str:
    """Joins the keys of a path by dots, without Haiku's `~`."""
    segments: list[str] = []
    for key in path:
        # DictKey and FlattenedIndexKey have a key, SequenceKey an idx, GetAttrKey a name; the keys
        # of a user's container may be of any type, those of flax.traverse_util are tuples.
        name = next((getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)), key)
        if isinstance(name, LayerIndex):
            segments.insert(name.depth, str(name))
            continue
        for part in name if isinstance(name, tuple) else (name,):
            segments += [part for part in str(part).split("/") if part != "~"]  # Haiku's modules
    return ".".join(segments)


def _is_box(node: Any) -> bool:
    """Returns True for one parameter in a Flax wrapper."""
    return is_flax(node, "Variable", "AxisMetadata")


def is_flax(node: Any, *names: str) -> bool:
    """Returns True for an instance of these Flax classes; avoids importing Flax."""
    return any(
        base.__name__ in names and base.__module__.startswith("flax.")
        for base in type(node).__mro__
    )


def is_none(node: Any) -> bool:
    """Returns True for None; `is_leaf` of trees with holes."""
    return node is None


def replace_subtree(tree: Any, keys: Sequence[str], function: Callable[[Any], Any]) -> Any:
    """Returns nested dicts in which a function has replaced the subtree at a sequence of keys.

    The other arrays are shared.
    """
    if not keys:
        return function(tree)
    return {**tree, keys[0]: replace_subtree(tree[keys[0]], keys[1:], function)}
