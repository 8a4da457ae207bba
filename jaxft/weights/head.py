"""A head to start from, where the weights bring none that fits."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import WeightsError
from jaxft.models.model import Model, Tree

Start = Literal["fresh", "zeros", "xavier"]
"""`fresh`: as the network's own initialisation, which is torch's. `zeros`: the last layer's kernel
and bias are zero (BiT). `xavier`: its kernel is uniform in +-sqrt(6 / (inputs + outputs))."""


def with_head(
    model: Model, params: Tree, start: Start | Mapping[str, Tree], key: jax.Array
) -> Tree:
    """`params` with `new_head`'s in the place of their own; what is below `params` is shared."""

    def put(tree: Tree, path: list[str]) -> Tree:
        if not path:
            return new_head(model, start, key)
        return {**tree, path[0]: put(tree[path[0]], path[1:])}

    return put(params, model.head.split("."))


def new_head(model: Model, start: Start | Mapping[str, Tree], key: jax.Array) -> Tree:
    """The `params` at `model.head`: drawn as `start` says, or `start` itself if it is such a tree.

    Raises WeightsError for a tree of another structure or other shapes, and where a head of several
    layers does not number them.
    """
    # Compiled, so that no memory or time goes to the body, of which nothing is asked for.
    head = jax.jit(lambda key: at(model.init(key)[0], model.head.split(".")))(key)
    if isinstance(start, Mapping):
        if (given := _shapes(start)) != (wanted := _shapes(head)):
            raise WeightsError(f"the head given has {given}; {model.name} wants {wanted}")
        return jax.tree.map(lambda leaf, own: jnp.asarray(leaf, own.dtype), dict(start), head)
    if start == "fresh":
        return head
    last = at(head, last_layer(model, head))
    if start == "zeros":
        last.update(jax.tree.map(jnp.zeros_like, last))
    else:
        bound = math.sqrt(6 / sum(last["kernel"].shape))
        drawn = jax.random.uniform(key, last["kernel"].shape, jnp.float32, -bound, bound)
        last["kernel"] = drawn.astype(last["kernel"].dtype)
    return head


def last_layer(model: Model, head: Tree) -> tuple[str, ...]:
    """Returns the keys, below the head, of the layer that makes the logits.

    Raises WeightsError where a head of several layers does not number them.
    """
    if "kernel" in head:
        return ()
    if not all(map(str.isdecimal, head)):
        raise WeightsError(
            f"which layer of {model.name}'s head {model.head!r} is the last is not known: name "
            "that layer as the head, or start it fresh"
        )
    return (max(head, key=int),)


def at(tree: Tree, keys: Iterable[str]) -> Tree:
    """Returns the part of nested dicts below some keys."""
    for key in keys:
        tree = tree[key]
    return tree


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in flat}
