"""Trees of the parameters of one label, with a `MaskedNode` in the place of all others."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from jaxft.labels import Tree


def masked_tree(labels: Tree, label: str) -> Tree:
    """Returns the tree of a label, with a `MaskedNode` for each leaf of another label.

    Example:
      >>> masked_tree({"body": {"w": "late", "b": "late"}, "head": "head"}, "head")
      {'body': {'b': MaskedNode(), 'w': MaskedNode()}, 'head': 'head'}
    """
    return jax.tree.map(lambda x: x if x == label else optax.MaskedNode(), labels)


def compact_trees(labels: Tree) -> dict[str, Tree]:
    """Returns a tree for each label, with a `MaskedNode` for each subtree without that label.

    JAX builds every `MaskedNode` in Python, at each step. With a hundred labels, one for each leaf
    would take longer than the rest of tracing.

    Example:
      >>> compact_trees({"body": {"w": "late", "b": "late"}, "head": "head"})["head"]
      {'body': MaskedNode(), 'head': 'head'}
    """
    if jax.tree_util.all_leaves([labels]):
        return {labels: labels}
    structure: Any
    children, structure = jax.tree.flatten(labels, is_leaf=lambda node: node is not labels)
    parts = [compact_trees(child) for child in children]
    absent = [
        _absent(labels, child) if part else child
        for child, part in zip(children, parts, strict=True)
    ]
    return {
        label: structure.unflatten(
            [part.get(label, other) for part, other in zip(parts, absent, strict=True)]
        )
        for label in dict.fromkeys(label for part in parts for label in part)
    }


def _absent(parent: Any, child: Any) -> Any:
    """Returns the substitute for a child without the label.

    Containers other than dicts, lists and tuples may accept no other child than they have.
    """
    if isinstance(parent, Mapping | list | tuple):
        return optax.MaskedNode()
    return jax.tree.map(lambda _: optax.MaskedNode(), child)
