"""Views of layers that are stacked in one array, as `nn.scan` and `nnx.vmap` store them.

The inverse functions `unstack` and `stack` split an array of layers into one leaf per layer and
join it again, in the containers of any framework.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import LabelError, ModelError, PatternError, first_of
from jaxft.labels import Tree, paths
from jaxft.patterns import matcher, unmatched_message
from jaxft.tree_paths import LayerIndex, dotted, is_none, leaves_of, replace_subtree


@dataclass(frozen=True)
class LayerStack:
    """A pytree with the layers of a stacked parameter, in place of its array.

    Attributes:
      layers: the array of each layer, or another leaf such as its label.
      axis: the axis of the stacked array that counts the layers.
      depth: number of segments of a path before the index of the layer.
    """

    layers: tuple[Any, ...]
    axis: int
    depth: int


def _flatten(stack: LayerStack) -> tuple[tuple[Any, ...], tuple[int, int]]:
    return stack.layers, (stack.axis, stack.depth)


def _flatten_with_keys(stack: LayerStack) -> tuple[list[tuple[Any, Any]], tuple[int, int]]:
    keys = (LayerIndex(i, stack.depth) for i in range(len(stack.layers)))
    keyed = zip(map(jax.tree_util.DictKey, keys), stack.layers, strict=True)
    return list(keyed), (stack.axis, stack.depth)


def _unflatten(aux: tuple[int, int], layers: Iterable[Any]) -> LayerStack:
    return LayerStack(tuple(layers), *aux)


jax.tree_util.register_pytree_with_keys(LayerStack, _flatten_with_keys, _unflatten, _flatten)


def unstack(params: Tree, *stacks: str, axis: int = 0) -> Tree:
    """Splits stacked parameters into one leaf per layer; `stack` joins them again.

    `nn.scan` and `nnx.vmap` keep the parameters of all layers in one array, which an optimizer
    treats as a whole. After `unstack(params, "blocks")`, layer 3 has the paths `blocks.3.*`, as in
    the unrolled network. Label, plan, partition and optimize this tree, and call
    `stack(combine(trainable, frozen))` within the loss. Norm layers and biases are vectors again,
    e.g. for `AdamW(decay_vectors=False)`.

    Frozen layers have no optimizer state and stay bit-identical, but their backward pass is not
    saved. The scan runs backward over all layers and computes the gradients of all of them as soon
    as one layer of the stack, or a parameter before it, trains. JAX leaves out this backward pass
    only if none of them trains. Each step also copies the layers into the stacked array.

    Args:
      params: a pytree of parameters or of their shapes.
      *stacks: paths of the stacked layers, such as `encoder.blocks`; `*` globs within a segment.
      axis: the axis that counts the layers.

    Returns:
      The tree with a `LayerStack` in place of each stacked array.

    Raises:
      PatternError: a path matches nothing.
      LabelError: the arrays of a stack have different numbers of layers.

    Example:
      >>> params = {"blocks": {"kernel": np.zeros((2, 4, 4)), "bias": np.zeros((2, 4))}}
      >>> layers = unstack(params, "blocks")
      >>> paths(layers)
      ['blocks.0.bias', 'blocks.1.bias', 'blocks.0.kernel', 'blocks.1.kernel']
      >>> jax.tree.map(np.shape, stack(layers))
      {'blocks': {'bias': (2, 4), 'kernel': (2, 4, 4)}}
    """
    leaves = leaves_of(params)
    values = [leaf.value for leaf in leaves]
    errors = []
    for name in stacks:
        matches = matcher(name)
        arrays = [i for i, x in enumerate(values) if hasattr(x, "shape")]
        indices = [i for i in arrays if matches(leaves[i].path, values[i])]
        if "**" in name or not indices:
            reason = "'**' gives the stack no fixed depth" if "**" in name else ""
            raise PatternError(f"unstack: {reason or unmatched_message(name, paths(params))}")
        counts = {values[i].shape[axis : axis + 1] for i in indices}
        if len(counts) > 1 or () in counts:
            shapes = [f"{leaves[i].path} {list(values[i].shape)}" for i in indices]
            shown = ", ".join(first_of(shapes, 5, "... and {} more"))
            errors.append(f"{name!r} has no common number of layers on axis {axis}: {shown}")
            continue
        for i in indices:
            values[i] = LayerStack(_split(values[i], axis), axis, len(name.split(".")))
    if errors:
        raise LabelError(f"unstack: {'; '.join(errors)}.")
    return jax.tree.unflatten(jax.tree.structure(params, is_leaf=is_none), values)


def stack(params: Tree) -> Tree:
    """Joins the layers that `unstack` split.

    Raises:
      LabelError: some layers of an array are None, as in the halves of `partition`.
    """

    def join(path: tuple[Any, ...], node: Any) -> Any:
        if not _is_stack(node):
            return node
        layers = [stack(layer) for layer in node.layers]  # a stack may hold stacks
        if all(layer is None for layer in layers):
            return None
        if missing := [i for i, layer in enumerate(layers) if layer is None]:
            raise LabelError(
                f"stack: layers {missing} of {dotted(path)} are None. Join the halves first: "
                "jaxft.stack(jaxft.combine(trainable, frozen))."
            )
        return _join(layers, node.axis)

    return jax.tree_util.tree_map_with_path(join, params, is_leaf=_is_stack)


def split_layers(name: str, params: Tree, path: str) -> Tree:
    """Splits the parameters below a path into a nested dict for each layer: `blocks.3.kernel`.

    Args:
      name: name of the network, for error messages.
      params: parameters of a Flax module as nested dicts.
      path: path of parameters that are stacked on their first axis, such as `encoder.blocks`.

    Raises:
      ModelError: there are no parameters below the path, or they have no common number of layers.
    """
    below = {p: x for p, x in zip(paths(params), jax.tree.leaves(params), strict=True)
             if p.startswith(f"{path}.")}  # fmt: skip
    if not below:
        raise ModelError(f"{name}: in stacked, {unmatched_message(path, paths(params))}")
    if len(counts := {x.shape[:1] for x in below.values()}) > 1 or () in counts:
        shapes = first_of((f"{p} {list(x.shape)}" for p, x in below.items()), 5)
        raise ModelError(
            f"{name}: in stacked, {path!r} has no common number of layers on its first axis: "
            f"{', '.join(shapes)}"
        )

    def split(tree: Tree) -> Tree:
        leaves, structure = jax.tree.flatten(tree)
        layers = zip(*(_split(leaf, 0) for leaf in leaves), strict=True)
        return {str(i): jax.tree.unflatten(structure, layer) for i, layer in enumerate(layers)}

    return replace_subtree(params, path.split("."), split)


def join_layers(params: Tree, path: str) -> Tree:
    """Joins the layers that `split_layers` split."""

    def join(layers: Tree) -> Tree:
        trees = (layers[str(i)] for i in range(len(layers)))
        return jax.tree.map(lambda *arrays: _join([*arrays], 0), *trees)

    return replace_subtree(params, path.split("."), join)


def _is_stack(node: Any) -> bool:
    return isinstance(node, LayerStack)


def _split(array: Any, axis: int) -> tuple[Any, ...]:
    if isinstance(array, jax.ShapeDtypeStruct):
        shape = (*array.shape[:axis], *array.shape[axis + 1 :])
        return (jax.ShapeDtypeStruct(shape, array.dtype),) * array.shape[axis]
    if isinstance(array, np.ndarray):
        return tuple(np.moveaxis(array, axis, 0))
    return tuple(jnp.unstack(array, axis=axis))


def _join(layers: list[Any], axis: int) -> Any:
    first = layers[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        shape = (*first.shape[:axis], len(layers), *first.shape[axis:])
        return jax.ShapeDtypeStruct(shape, first.dtype)
    only_numpy = all(isinstance(layer, np.ndarray) for layer in layers)
    return (np if only_numpy else jnp).stack(layers, axis)
