"""Matches the classes of a pretrained head to the classes of the images, by name."""

import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import WeightsError, first_of
from jaxft.models.model import Model, Tree
from jaxft.models.nnx_adapter import init_shapes
from jaxft.weights.head import last_layer, subtree

Order = tuple[int, ...]
"""Index of the head's output for each class of the images."""

_SHOWN = 8  # names per list


def class_order(
    head: Sequence[str], images: Sequence[str], *, source: str, way_out: str
) -> Order | None:
    """Returns the permutation from the head's classes to the images' classes.

    Names are compared in Unicode normalisation form NFC.

    Args:
      head: Class names of the head, in the order of its outputs.
      images: Class names of the images.
      source: Name of the weights, for the message.
      way_out: Remedy to print in the message.

    Returns:
      The order, or None if both orders are equal.

    Raises:
      WeightsError: The names differ. The message lists both, or the differences of long lists, and
        suggests `head_classes="ignore"` if the numbers of classes agree.
    """
    head, images = ([unicodedata.normalize("NFC", name) for name in x] for x in (head, images))
    if head == images:
        return None
    if sorted(head) == sorted(images) and len(set(images)) == len(images):
        return tuple(map(head.index, images))
    lines = [f"{source} has a head for other classes than the images."]
    if max(len(head), len(images)) <= _SHOWN:
        lines += [f"  the head's ({len(head)}): {', '.join(head)}"]
        lines += [f"  the images' ({len(images)}): {', '.join(images)}"]
    else:
        lines += [f"  only the head's: {_list_names(head, without=images)}"]
        lines += [f"  only the images': {_list_names(images, without=head)}"]
        lines += [f"  both have {len({*head} & {*images})} of {len(head)} and {len(images)}"]
    if len(head) == len(images):
        way_out += "\nhead_classes='ignore' uses its outputs for these classes, in this order."
    raise WeightsError("\n".join([*lines, way_out]))


def reordering(head: Sequence[str], images: Sequence[str], source: str) -> str:
    """Returns the remark that the outputs of a head were reordered."""
    return (
        f"{source} has the images' classes in another order ({_list_names(head)}): the outputs of "
        f"its head were reordered to match the images ({_list_names(images)})."
    )


def reordered(model: Model, tree: Tree, order: Order) -> Tree:
    """Returns `tree` with the outputs of the head's last layer in another order.

    The single output of a binary head is the logit of the second class against the first. Swapping
    the classes negates it, except in a running mean of squared gradients (`nu`), which has no sign.

    Args:
      model: Network.
      tree: `params`, or a tree that contains arrays in the structure of `params`, such as an
        optimizer's state. Leaves are found by path and shape, and stay on their devices.
      order: Index of the present output for each new one.
    """
    params, _ = init_shapes(model)
    head = tuple(model.head.split("."))
    layer = (*head, *last_layer(model, subtree(params, head)))
    shapes = {(*layer, name): jnp.shape(leaf) for name, leaf in subtree(params, layer).items()}
    if any(shape[-1:] not in ((len(order),), (1,)) for shape in shapes.values()):
        raise WeightsError(
            f"which axis of {model.name}'s last layer holds its outputs is not known, and the "
            "classes are in another order: start the head fresh, or reorder the classes"
        )

    def reorder(path: Any, leaf: Any) -> Any:
        keys = tuple(str(getattr(key, "key", getattr(key, "name", ""))) for key in path)
        shape = shapes.get(keys[-len(layer) - 1 :])
        if shape is None or jnp.shape(leaf) != shape:
            return leaf
        if shape[-1] == len(order):
            permute = partial(jnp.take, indices=jnp.asarray(order), axis=-1)
            return _apply_on_devices(permute, leaf)
        attributes = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        is_squared = any(name.startswith("nu") for name in attributes)
        return leaf if is_squared else _apply_on_devices(jnp.negative, leaf)

    return jax.tree_util.tree_map_with_path(reorder, tree)


def _apply_on_devices(function: Callable[[Any], Any], leaf: Any) -> Any:
    """Applies a function to an array, with the result on the array's devices."""
    if not isinstance(leaf, jax.Array):
        return jax.device_get(function(leaf))
    return jax.jit(function, out_shardings=leaf.sharding)(leaf)


def _list_names(names: Sequence[str], without: Sequence[str] = ()) -> str:
    shown = [name for name in names if name not in set(without)]
    return ", ".join(first_of(shown, _SHOWN, "... and {} more")) or "none"
