"""Matches a head's classes to those of the images, by name."""

import unicodedata
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxft.errors import WeightsError, first_of
from jaxft.models.model import Model, Tree
from jaxft.weights.head import at, last_layer

Order = tuple[int, ...]
"""For each of the images' classes, which of the head's outputs is its own."""

_SHOWN = 8  # names of a list


def class_order(
    head: Sequence[str], images: Sequence[str], *, source: str, way_out: str
) -> Order | None:
    """Returns the order that a head's outputs are to be put in; None if it is theirs already.

    Names are compared in Unicode's NFC.

    Raises:
      WeightsError: the names differ; shows both lists, or the differences of long ones. Its last
        lines are `way_out` and, where the numbers agree, `head_classes`.
    """
    theirs, ours = ([unicodedata.normalize("NFC", name) for name in x] for x in (head, images))
    if theirs == ours:
        return None
    if sorted(theirs) == sorted(ours) and len(set(ours)) == len(ours):
        return tuple(map(theirs.index, ours))
    lines = [f"{source} has a head for other classes than the images."]
    if max(len(theirs), len(ours)) <= _SHOWN:
        lines += [f"  the head's ({len(theirs)}): {', '.join(theirs)}"]
        lines += [f"  the images' ({len(ours)}): {', '.join(ours)}"]
    else:
        lines += [f"  only the head's: {_listed(theirs, ours)}"]
        lines += [f"  only the images': {_listed(ours, theirs)}"]
        lines += [f"  both have {len({*theirs} & {*ours})} of {len(theirs)} and {len(ours)}"]
    if len(theirs) == len(ours):
        way_out += "\nhead_classes='ignore' takes its outputs for these classes, in this order."
    raise WeightsError("\n".join([*lines, way_out]))


def reordering(head: Sequence[str], images: Sequence[str], source: str) -> str:
    """Says that a head's outputs were put in the images' order."""
    return (
        f"{source} has the images' classes in another order ({_listed(head)}): the outputs of its "
        f"head are put in theirs ({_listed(images)})."
    )


def reordered(model: Model, tree: Tree, order: Order) -> Tree:
    """Returns `tree` with the outputs of the head's last layer in another order.

    `tree` is `params`, or any tree that holds arrays in the structure of `params`, such as an
    optimizer's state: leaves are found by path and shape. Arrays stay on their devices.

    A binary head has one output, the logit of the second class against the first: to swap them is
    to negate it. A running mean of squared gradients (`nu`) has no sign.
    """
    params, _ = jax.eval_shape(model.init, jax.random.key(0))
    head = tuple(model.head.split("."))
    keys = (*head, *last_layer(model, at(params, head)))
    shapes = {(*keys, leaf): jnp.shape(x) for leaf, x in at(params, keys).items()}
    if any(shape[-1:] not in ((len(order),), (1,)) for shape in shapes.values()):
        raise WeightsError(
            f"which axis of {model.name}'s last layer has its outputs is not known, and the "
            "classes are in another order: start the head fresh, or bring them into that order"
        )

    def put(path: Any, leaf: Any) -> Any:
        names = tuple(str(getattr(key, "key", getattr(key, "name", ""))) for key in path)
        shape = shapes.get(names[-len(keys) - 1 :])
        if shape is None or jnp.shape(leaf) != shape:
            return leaf
        if shape[-1] == len(order):
            return _on_its_devices(partial(jnp.take, indices=jnp.asarray(order), axis=-1), leaf)
        fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
        squared = any(name.startswith("nu") for name in fields)
        return leaf if squared else _on_its_devices(jnp.negative, leaf)

    return jax.tree_util.tree_map_with_path(put, tree)


def _on_its_devices(change: Any, leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return jax.device_get(change(leaf))
    return jax.jit(change, out_shardings=leaf.sharding)(leaf)


def _listed(names: Sequence[str], without: Sequence[str] = ()) -> str:
    shown = [name for name in names if name not in set(without)]
    return ", ".join(first_of(shown, _SHOWN, "... and {} more")) or "none"
