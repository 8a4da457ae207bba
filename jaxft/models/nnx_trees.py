"""An NNX module's state as plain trees, and back."""

from typing import Any

from flax import nnx

from jaxft.models.model import Tree


def outside(module: nnx.Module, kind: type[nnx.Variable[Any]]) -> Tree:
    """The module's variables of a kind as nested dicts; the indices of lists become strings."""
    return _outside(nnx.to_pure_dict(nnx.state(module, kind)))


def inside(tree: Tree, like: Tree) -> Tree:
    """The inverse of `outside`: with the keys of `like`, such as `nnx.to_pure_dict` gives."""
    if not isinstance(like, dict):
        return tree
    return {key: inside(tree[str(key)], value) for key, value in like.items()}


def _outside(tree: Tree) -> Tree:
    if not isinstance(tree, dict):
        return tree
    return {str(key): _outside(value) for key, value in tree.items()}
