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
from jaxft.weights.description import MARK, check_options
from jaxft.weights.families import renamed
from jaxft.weights.finite_check import check_finite
from jaxft.weights.head import Start, with_head
from jaxft.weights.head_classes import Order, class_order, reordered, reordering
from jaxft.weights.key_maps import TorchTensor, file_tensors
from jaxft.weights.mismatch import mismatch
from jaxft.weights.network_prefix import IN_MEMORY, find_head, find_prefix, taken
from jaxft.weights.read import Weights, named_tensors, read
from jaxft.weights.tensors import LazyTensor, in_memory


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

    Strict in both directions: each of the network's tensors is filled once, in its shape, and each
    of the file's used once. What lies beside the network is left, with a remark that counts it: see
    `fitted`. torch's `num_batches_tracked` counters are passed over, and with another head the
    file's own. Tensors are read one by one: at no time is there more in memory than the result and
    one of them.

    Raises WeightsError with every mismatch at once, for values that are not finite, running
    variances below 0, or where there is no readable file.
    """
    _check_head(head)
    if isinstance(weights, Weights):
        return load_fitted(fitted(weights, model, head, classes), model, head, key, classes)
    weights = fitted(read(weights, own_names=not model.torch_named), model, head, classes)
    if weights.remarks:
        warnings.warn(" ".join(weights.remarks), stacklevel=2)
    return load_fitted(weights, model, head, key, classes)


def load_fitted(
    weights: Weights,
    model: Model,
    head: Literal["keep"] | Start | Mapping[str, Tree],
    key: jax.Array | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Tree, Tree]:
    """Returns the `(params, stats)` of what `fitted` returned for the same model, head and classes.

    Raises WeightsError for values that are not finite, and running variances below 0.
    """
    key = jax.random.key(0) if key is None else key
    order = _order(weights, classes) if head == "keep" else None
    abstract = jax.eval_shape(model.init, key)
    tensors, found = file_tensors(model, *abstract), weights.tensors

    def leaf(tensor: TorchTensor, shape: jax.ShapeDtypeStruct) -> Any:
        if tensor.name not in found:
            return shape  # the new head's
        array = tensor.from_torch(found[tensor.name].read())
        with np.errstate(over="ignore"):  # `check_finite` names what is too large
            array = np.array(array, shape.dtype, order="C")
        return jax.device_put(array)  # jax.numpy would compile a program for each shape

    params, stats = jax.tree.map(leaf, tensors, abstract)
    if head != "keep":
        params = with_head(model, params, head, key)
        if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(stats)):
            fresh = jax.jit(lambda key: model.init(key)[1])(key)  # of norm layers in the new head
            stats = jax.tree.map(lambda x, y: x if isinstance(x, jax.Array) else y, stats, fresh)
    elif order:
        params = reordered(model, params, order)
    names = (tensor.name for tensor in jax.tree.leaves(tensors))
    check_finite(weights.source, names, (params, stats))
    return params, stats


def from_state_dict(
    state: Mapping[str, Any],
    model: Model,
    *,
    head: Literal["keep"] | Start | Mapping[str, Tree] = "keep",
    key: jax.Array | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Tree, Tree]:
    """Returns the `(params, stats)` of a state dict in memory, as `load` does of a file.

    Args:
      state: torch's names (a user's module has its own) to arrays of NumPy or jax, or to torch's
        tensors, on whatever device. torch itself is not imported.
      model, head, key, classes: as in `load`.

    Raises:
      WeightsError: as `load`, strict in both directions.

    Example:
      params, stats = weights.from_state_dict(torch_module.state_dict(), model)
    """
    _check_head(head)
    source = IN_MEMORY
    if not isinstance(state, Mapping):
        raise WeightsError(f"{source} must map names to arrays; it is a {type(state).__name__}.")
    content = in_memory(state)
    if model.torch_named:
        tensors, remarks = named_tensors(content, source)
    elif wrong := [str(name) for name, x in content.items() if not isinstance(x, LazyTensor)]:
        raise WeightsError(f"{source} has values that are no arrays: {', '.join(wrong[:8])}")
    else:
        tensors, remarks = content, ()
    weights = fitted(Weights(source, tensors, None, remarks), model, head, classes)
    if weights.remarks:
        warnings.warn(" ".join(weights.remarks), stacklevel=2)
    return load_fitted(weights, model, head, key, classes)


def fitted(
    weights: Weights,
    model: Model,
    head: Literal["keep"] | Start | Mapping[str, Tree],
    classes: Sequence[str] | None,
) -> Weights:
    """Returns the tensors of `model` alone, by its names, and remarks on the rest.

    The network's body is looked for below any prefix. With `head="keep"`, its head is taken from
    beside it if it is not there; what else is below the prefix must be the network's. With another
    head, modules that are not the body's count as the old head. What is beside them is left.

    Raises WeightsError as `load`.
    """
    own, keep = not model.torch_named, head == "keep"
    source, remarks = weights.source, list(weights.remarks)
    if keep and classes is not None and weights.network.classes and _order(weights, classes):
        remarks.append(reordering(weights.network.classes, classes, source))
    leaves = jax.tree.leaves(file_tensors(model, *jax.eval_shape(model.init, jax.random.key(0))))
    body = {t.name: t for t in leaves if not t.name.startswith(f"{model.head}.")}
    last = {t.name: t for t in leaves if t.name not in body}
    named = {n: x for n, x in weights.tensors.items() if not n.endswith("num_batches_tracked")}
    shapes = {name: tensor.shape for name, tensor in body.items()}
    prefix = find_prefix(named, shapes, source, own_names=own)
    inside = {n.removeprefix(prefix): x for n, x in named.items() if n.startswith(prefix)}
    if prefix and not own:
        targets = renamed(inside, source)
        inside = {targets[name]: x for name, x in inside.items()}
    options = dict(weights.network.options)
    if not own and MARK in inside:
        del inside[MARK]
        options[MARK] = True
    check_options(options, model, source, keep=keep)
    beside = {n: x for n, x in named.items() if prefix and not n.startswith(prefix)}
    if keep and not any(name.startswith(f"{model.head}.") for name in inside):
        shapes = {name: tensor.shape for name, tensor in last.items()}
        if there := find_head(beside, shapes, own_names=own):
            inside |= {target: beside.pop(name) for target, name in there.items()}
            remarks.append(f"Took the head from {', '.join(sorted(there.values()))} in {source}.")
    modules = {name.partition(".")[0] for name in body}
    wanted = {**body, **last} if keep else body

    def is_left(name: str) -> bool:
        in_a_module = "." in name if keep else name.partition(".")[0] in modules
        return name not in wanted and not in_a_module

    of_head = {n for n in inside if not keep and n.startswith(f"{model.head}.")}
    others = [n for n in inside if n not in of_head and is_left(n)]
    found = {n: x for n, x in inside.items() if n not in of_head and n not in others}
    if mismatch(wanted, found, model.head):
        found = {n: x for n, x in inside.items() if n not in of_head}
        report = mismatch(wanted, found, model.head, prefix)
        raise WeightsError(f"{source} does not fit {model.name}: {report}")
    if prefix or others:
        left = [*beside, *(prefix + name for name in others)]
        remarks.append(taken(source, prefix, len(found), left))
    name = weights.network.model
    if model.torch_named and name not in (None, model.name):
        remarks.append(
            f"{source} describes its network as {name}: all tensors fit {model.name}, but whether "
            "both compute the same is not known."
        )
    network = replace(weights.network, options=options)
    return replace(weights, tensors=found, remarks=tuple(remarks), network=network)


def _order(weights: Weights, classes: Sequence[str] | None) -> Order | None:
    if classes is None or weights.network.classes is None:
        return None
    way_out = "head='fresh' starts a new head."
    return class_order(weights.network.classes, classes, source=weights.source, way_out=way_out)


def _check_head(head: Any) -> None:
    """Raises WeightsError unless it is one of the words for a head, or a tree."""
    if not isinstance(head, Mapping) and head not in ("keep", *get_args(Start)):
        raise WeightsError(
            f"head is {head!r}; it must be {', '.join(('keep', *get_args(Start)))} or a tree."
        )
