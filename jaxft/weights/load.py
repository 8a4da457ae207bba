"""Fits a weights file to a network, exactly, or says why it does not fit."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxft.errors import WeightsError
from jaxft.models.model import Model, Tree
from jaxft.weights.classes import Order, class_order, reordered, reordering
from jaxft.weights.finite import check_finite
from jaxft.weights.head import Start, with_head
from jaxft.weights.names import TorchTensor, file_tensors
from jaxft.weights.read import Weights, read
from jaxft.weights.report import mismatch


def load(
    weights: str | PathLike[str] | Weights,
    model: Model,
    *,
    head: Literal["keep"] | Start | Mapping[str, Tree] = "keep",
    key: jax.Array | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Tree, Tree]:
    """The `(params, stats)` of a file, in the structure and dtypes of `model.init`'s.

    weights: what `read` takes, or gives. What `read` remarks of a source is a UserWarning here.
    head: `keep` the file's, or start from another: `fresh`, `zeros`, `xavier` (see `Start`), drawn
      with `key` (`jax.random.key(0)` by default), or the given tree itself.
    classes: names of the logits that are wanted. If the source names those of a head that is kept,
      they must be the same; in another order, the head's outputs are put in the wanted one.

    Strict in both directions: each of the file's tensors is used once and each of the network's
    filled once, in its shape; only torch's `num_batches_tracked` counters are passed over, and
    with another head the file's own. Tensors are read one by one: at no time is there more in
    memory than the result and one of them.

    Raises WeightsError with every mismatch at once, for values that are not finite, or where there
    is no readable file.
    """
    if not isinstance(head, Mapping) and head not in ("keep", *get_args(Start)):
        raise ValueError(f"head is {', '.join(('keep', *get_args(Start)))} or a tree, not {head!r}")
    key = jax.random.key(0) if key is None else key
    if not isinstance(weights, Weights):
        weights = checked(read(weights, own_names=not model.torch_named), head, classes)
        if weights.remarks:
            warnings.warn(" ".join(weights.remarks), stacklevel=2)

    order = _order(weights, classes) if head == "keep" else None

    def skipped(name: str) -> bool:
        in_head = name.startswith(f"{model.head}.")
        return name.endswith("num_batches_tracked") or (head != "keep" and in_head)

    abstract = jax.eval_shape(model.init, key)
    tensors = file_tensors(model, *abstract)
    wanted = {t.name: t for t in jax.tree.leaves(tensors) if not skipped(t.name)}
    found = {name: x for name, x in weights.tensors.items() if not skipped(name)}
    report = mismatch(wanted, found, model.head)
    if report is not None:
        raise WeightsError(f"{weights.source} does not fit {model.name}: {report}")

    def leaf(tensor: TorchTensor, shape: jax.ShapeDtypeStruct) -> Any:
        if tensor.name not in found:
            return shape  # the new head's
        array = tensor.from_torch(found[tensor.name].read())
        # By jax.numpy it would be a compiled program for each shape.
        return jax.device_put(np.array(array, shape.dtype, order="C"))

    params, stats = jax.tree.map(leaf, tensors, abstract)
    if head != "keep":
        params = with_head(model, params, head, key)
    elif order:
        params = reordered(model, params, order)
    names = (tensor.name for tensor in jax.tree.leaves(tensors))
    check_finite(weights.source, zip(names, jax.tree.leaves((params, stats)), strict=True))
    return params, stats


def checked(
    weights: Weights,
    head: Literal["keep"] | Start | Mapping[str, Tree],
    classes: Sequence[str] | None,
) -> Weights:
    """Returns the weights, with a remark if `load` will put their head's outputs in another order.

    Raises WeightsError as `load` for other classes.
    """
    if head == "keep" and classes is not None and _order(weights, classes):
        assert weights.network.classes is not None
        remark = reordering(weights.network.classes, classes, weights.source)
        return replace(weights, remarks=(*weights.remarks, remark))
    return weights


def _order(weights: Weights, classes: Sequence[str] | None) -> Order | None:
    if classes is None or weights.network.classes is None:
        return None
    way_out = "head='fresh' starts a new head."
    return class_order(weights.network.classes, classes, source=weights.source, way_out=way_out)
