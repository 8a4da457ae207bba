"""Loads pretrained weights into a network, or reports every mismatch."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, get_args

import jax
import numpy as np

from jaxft.errors import WeightsError
from jaxft.models.model import Model, Tree
from jaxft.models.nnx_adapter import init_shapes
from jaxft.weights.description import MARK, check_options
from jaxft.weights.finite_check import check_finite
from jaxft.weights.head import Start, with_head
from jaxft.weights.head_classes import Order, class_order, reordered, reordering
from jaxft.weights.key_maps import TorchTensor, file_tensors, renamed, reshaped, resized
from jaxft.weights.mismatch import mismatch
from jaxft.weights.network_prefix import IN_MEMORY, find_head, find_prefix, selection_remark
from jaxft.weights.read import Weights, read, unwrapped_tensors
from jaxft.weights.tensors import LazyTensor, as_lazy

Head = Literal["keep"] | Start | Mapping[str, Tree]


def load(
    weights: str | PathLike[str] | Weights,
    model: Model,
    *,
    head: Head = "keep",
    key: jax.Array | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Tree, Tree]:
    """Loads weights from a file, the hub or another source.

    Loading is strict in both directions: each tensor of the network is loaded exactly once, in its
    shape, and each tensor of the file is used. Tensors outside the network are ignored with a
    warning (see `fitted`); torch's `num_batches_tracked` counters are ignored silently, and so is
    the file's head if another one is wanted.

    Tensors are read one by one. Peak memory is the result and one tensor.

    Args:
      weights: A source that `read` accepts, or its result. For a source, the remarks of `read` are
        issued as a UserWarning.
      model: Network.
      head: `"keep"` loads the file's head. `"fresh"`, `"zeros"` and `"xavier"` initialise a new one
        (see `Start`). A tree is used as the head's parameters.
      key: Random key of a new head, `jax.random.key(0)` by default.
      classes: Class names in the order of the logits. If the source names the classes of a head
        that is kept, they must be the same; if their order differs, the head's outputs are
        reordered.

    Returns:
      `(params, stats)` with the structure and dtypes of `model.init`.

    Raises:
      WeightsError: There is no readable file, tensors do not match (all are listed), or values are
        not finite or running variances below 0.
    """
    _check_head(head)
    if isinstance(weights, Weights):
        return load_fitted(fitted(weights, model, head, classes), model, head, key, classes)
    weights = fitted(read(weights, own_names=not model.key_map), model, head, classes)
    if weights.remarks:
        warnings.warn(" ".join(weights.remarks), stacklevel=2)
    return load_fitted(weights, model, head, key, classes)


def load_fitted(
    weights: Weights,
    model: Model,
    head: Head,
    key: jax.Array | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Tree, Tree]:
    """Reads the tensors of weights that `fitted` returned for the same model, head and classes.

    Args:
      weights: Result of `fitted`.
      model: Network.
      head: See `load`.
      key: See `load`.
      classes: See `load`.

    Returns:
      `(params, stats)`.

    Raises:
      WeightsError: Values are not finite, or running variances are below 0.
    """
    key = jax.random.key(0) if key is None else key
    order = _class_order(weights, classes) if head == "keep" else None
    abstract = init_shapes(model)
    targets, tensors = file_tensors(model, *abstract), weights.tensors

    def read_leaf(target: TorchTensor, leaf: jax.ShapeDtypeStruct) -> Any:
        if target.name not in tensors:
            return leaf  # belongs to the new head
        array = target.from_torch(tensors[target.name].read())
        with np.errstate(over="ignore"):  # `check_finite` reports overflow
            array = np.array(array, leaf.dtype, order="C")
        return jax.device_put(array)  # jax.numpy would compile a program per shape

    params, stats = jax.tree.map(read_leaf, targets, abstract)
    if head != "keep":
        params = with_head(model, params, head, key)
        if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(stats)):
            # The new head has norm layers.
            initial = jax.jit(lambda key: model.init(key)[1])(key)
            stats = jax.tree.map(lambda x, y: x if isinstance(x, jax.Array) else y, stats, initial)
    elif order:
        params = reordered(model, params, order)
    names = (target.name for target in jax.tree.leaves(targets))
    check_finite(weights.source, names, (params, stats))
    return params, stats


def from_state_dict(
    state: Mapping[str, Any],
    model: Model,
    *,
    head: Head = "keep",
    key: jax.Array | None = None,
    classes: Sequence[str] | None = None,
) -> tuple[Tree, Tree]:
    """Loads weights from a state dict in memory.

    Loading is strict, see `load`. torch is not imported.

    Args:
      state: Maps torch's names (for a user's module, its paths) to arrays of NumPy or jax, or to
        torch tensors on any device.
      model: Network.
      head: See `load`.
      key: See `load`.
      classes: See `load`.

    Returns:
      `(params, stats)` with the structure and dtypes of `model.init`.

    Raises:
      WeightsError: See `load`.

    Example:
      params, stats = weights.from_state_dict(torch_module.state_dict(), model)
    """
    _check_head(head)
    source = IN_MEMORY
    if not isinstance(state, Mapping):
        raise WeightsError(f"{source} must map names to arrays; it is a {type(state).__name__}.")
    content = as_lazy(state)
    if model.key_map:
        tensors, remarks = unwrapped_tensors(content, source)
    elif others := [str(name) for name, x in content.items() if not isinstance(x, LazyTensor)]:
        raise WeightsError(f"{source} has values that are not arrays: {', '.join(others[:8])}")
    else:
        tensors, remarks = content, ()
    weights = fitted(Weights(source, tensors, None, remarks), model, head, classes)
    if weights.remarks:
        warnings.warn(" ".join(weights.remarks), stacklevel=2)
    return load_fitted(weights, model, head, key, classes)


def fitted(weights: Weights, model: Model, head: Head, classes: Sequence[str] | None) -> Weights:
    """Selects the tensors of `model`, renames them to its names, and remarks on the others.

    The body may be below any prefix. With `head="keep"`, the head may be outside that prefix. Other
    tensors outside the prefix and buffers directly below it are ignored; with a new head also the
    modules below the prefix that are not part of the body.

    Args:
      weights: Result of `read`.
      model: Network.
      head: See `load`.
      classes: See `load`.

    Raises:
      WeightsError: See `load`.
    """
    key_map, keep = model.key_map, head == "keep"
    source, remarks = weights.source, list(weights.remarks)
    if keep and classes is not None and weights.network.classes and _class_order(weights, classes):
        remarks.append(reordering(weights.network.classes, classes, source))

    head_prefix = f"{model.head}."
    leaves = jax.tree.leaves(file_tensors(model, *init_shapes(model)))
    body = {t.name: t for t in leaves if not t.name.startswith(head_prefix)}
    head_layers = {t.name: t for t in leaves if t.name.startswith(head_prefix)}
    expected = {**body, **head_layers} if keep else body

    tensors = {n: x for n, x in weights.tensors.items() if not n.endswith("num_batches_tracked")}
    tensors = renamed(tensors, key_map, source) if key_map else tensors
    prefix = find_prefix(tensors, _shapes(body), source, key_map)
    inside = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    outside = {n: x for n, x in tensors.items() if not n.startswith(prefix)}
    if key_map:
        inside = renamed(inside, key_map, source) if prefix else inside
        inside = key_map.convert(inside) if key_map.convert else inside
        inside, resizes = resized(reshaped(inside, expected), expected, key_map)
        remarks += resizes

    options = dict(weights.network.options)
    if key_map and MARK in inside:
        del inside[MARK]
        options[MARK] = True
    check_options(options, model, source, keep=keep)

    has_head = any(name.startswith(head_prefix) for name in inside)
    if keep and not has_head:
        names = find_head(outside, _shapes(head_layers), key_map)
        if names:
            inside |= {target: outside.pop(name) for target, name in names.items()}
            remarks.append(f"Loaded the head from {', '.join(sorted(names.values()))} in {source}.")

    first_parts = {name.partition(".")[0] for name in body}
    head_part = f"{model.head.partition('.')[0]}."  # `head.` also if the head is `head.fc`
    candidates = {n: x for n, x in inside.items() if keep or not n.startswith(head_prefix)}

    def is_ignored(name: str) -> bool:
        is_in_network = "." in name if keep else name.partition(".")[0] in first_parts
        is_old_head = not keep and name.startswith(head_part)
        return name not in expected and (is_old_head or not is_in_network)

    selected = {name: x for name, x in candidates.items() if not is_ignored(name)}
    if mismatch(expected, selected, model.head):
        report = mismatch(expected, candidates, model.head, prefix)
        raise WeightsError(f"{source} does not fit {model.name}: {report}")
    ignored = [*outside, *(prefix + name for name in candidates if name not in selected)]
    if prefix or ignored:
        remarks.append(selection_remark(source, prefix, len(selected), ignored))
    name = weights.network.model
    if key_map and name not in (None, model.name):
        remarks.append(
            f"{source} describes its network as {name}: all tensors fit {model.name}, but whether "
            "both compute the same is not known."
        )
    network = replace(weights.network, options=options)
    return replace(weights, tensors=selected, remarks=tuple(remarks), network=network)


def _shapes(tensors: Mapping[str, TorchTensor]) -> dict[str, tuple[int, ...]]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _class_order(weights: Weights, classes: Sequence[str] | None) -> Order | None:
    if classes is None or weights.network.classes is None:
        return None
    way_out = "head='fresh' starts a new head."
    return class_order(weights.network.classes, classes, source=weights.source, way_out=way_out)


def _check_head(head: Any) -> None:
    if not isinstance(head, Mapping) and head not in ("keep", *get_args(Start)):
        raise WeightsError(
            f"head is {head!r}; it must be {', '.join(('keep', *get_args(Start)))} or a tree."
        )
