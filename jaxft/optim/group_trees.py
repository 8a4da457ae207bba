"""Trees of the parameters of one label, with a `MaskedNode` in the place of all others."""

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxft.labels import Tree


class GroupTrees:
    """Divides trees with the structure of a label tree into a tree per label, and joins these.

    Args:
      labels: the label tree; trees may have None in place of a leaf.
      groups: the labels whose trees are wanted.
      compact: those with one `MaskedNode` for a whole subtree, see `compact_trees`.
    """

    def __init__(self, labels: Tree, groups: Collection[str], compact: Collection[str]) -> None:
        names, structure = jax.tree.flatten(labels)
        small = compact_trees(labels)
        self._structure: Any = structure
        self._indices = {g: [i for i, name in enumerate(names) if name == g] for g in groups}
        self._structures: dict[str, Any] = {
            g: jax.tree.structure(small[g] if g in compact else masked_tree(labels, g))
            for g in groups
        }

    def divide(self, tree: Tree) -> dict[str, Tree]:
        """Returns the tree of each group."""
        leaves = self._structure.flatten_up_to(tree)
        return {
            group: self._structures[group].unflatten([leaves[i] for i in indices])
            for group, indices in self._indices.items()
        }

    def join(self, trees: Mapping[str, Tree], *others: Tree) -> Tree:
        """Returns the leaves of the groups' trees, and zeros for all leaves of `others` else."""
        columns = zip(*map(self._structure.flatten_up_to, others), strict=True)
        leaves = [next((x for x in column if x is not None), None) for column in columns]
        joined = [None] * len(leaves)
        for group, tree in trees.items():
            group_leaves = self._structures[group].flatten_up_to(tree)
            for i, leaf in zip(self._indices[group], group_leaves, strict=True):
                joined[i] = leaf
        grouped = {i for indices in self._indices.values() for i in indices}
        for i in set(range(len(leaves))) - grouped:
            joined[i] = jax.tree.map(jnp.zeros_like, leaves[i])  # of None: None
        return self._structure.unflatten(joined)


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
