"""Initialises a new head where the pretrained one is not used."""

import math
from collections.abc import Iterable, Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import WeightsError
from jaxft.models.model import Model, Tree
from jaxft.tree_paths import replace_subtree

Start = Literal["fresh", "zeros", "xavier"]
"""Initialisation of a new head.

`fresh`: the network's initialisation, which is torch's.
`zeros`: the last layer's kernel and bias are zero (BiT).
`xavier`: the last layer's kernel is uniform in +-sqrt(6 / (inputs + outputs)).
"""


def with_head(
    model: Model, params: Tree, start: Start | Mapping[str, Tree], key: jax.Array
) -> Tree:
    """Returns `params` with the head replaced by `new_head`. The other arrays are shared."""
    return replace_subtree(params, model.head.split("."), lambda _: new_head(model, start, key))


def new_head(model: Model, start: Start | Mapping[str, Tree], key: jax.Array) -> Tree:
    """Returns new parameters for the head.

    Args:
      model: Network whose `params` at `model.head` are wanted.
      start: Initialisation, or the parameters themselves.
      key: Random key.

    Raises:
      WeightsError: The given parameters have another structure or other shapes, or the layers of a
        head with several layers are not numbered.
    """
    # Compiled, so that XLA drops the initialisation of the body: no memory or time goes to it.
    head = jax.jit(lambda key: subtree(model.init(key)[0], model.head.split(".")))(key)
    if isinstance(start, Mapping):
        if (given := _shapes(start)) != (expected := _shapes(head)):
            raise WeightsError(f"the head given has {given}; {model.name} wants {expected}")
        return jax.tree.map(lambda leaf, like: jnp.asarray(leaf, like.dtype), dict(start), head)
    if start == "fresh":
        return head
    layer = subtree(head, last_layer(model, head))
    if start == "zeros":
        layer.update(jax.tree.map(jnp.zeros_like, layer))
    else:
        bound = math.sqrt(6 / sum(layer["kernel"].shape))
        kernel = jax.random.uniform(key, layer["kernel"].shape, jnp.float32, -bound, bound)
        layer["kernel"] = kernel.astype(layer["kernel"].dtype)
    return head


def last_layer(model: Model, head: Tree) -> tuple[str, ...]:
    """Returns the keys, below the head, of the layer that outputs the logits.

    Raises:
      WeightsError: The layers of a head with several layers are not numbered.
    """
    if "kernel" in head:
        return ()
    if not all(map(str.isdecimal, head)):
        raise WeightsError(
            f"which layer of {model.name}'s head {model.head!r} is the last is not known: name "
            "that layer as the head, or start it fresh"
        )
    return (max(head, key=int),)


def subtree(tree: Tree, keys: Iterable[str]) -> Tree:
    """Returns the subtree at a sequence of keys."""
    for key in keys:
        tree = tree[key]
    return tree


def _shapes(tree: Tree) -> dict[str, tuple[int, ...]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
