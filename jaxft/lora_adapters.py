"""LoRA: low-rank adapters of dense and convolution kernels, for the parameters of any framework.

An adapter is a pair of small arrays for one kernel. The adapters of a network are a separate
tree, so that they fit every container and need no change of the module: a loss takes
`merge_lora(params, adapters)` in place of `params`.
"""

import math
import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.errors import LabelError, PatternError, RecipeError, first_of
from jaxft.labels import Tree, match, unflatten
from jaxft.patterns import PatternKey, pattern_text
from jaxft.tree_paths import Leaf, leaves_of

LORA_A, LORA_B = "lora_a", "lora_b"
"""Names of the two arrays of an adapter."""

Adapters = dict[str, dict[str, jax.Array]]
"""`{path of a kernel: {"lora_a": [i r] or [h w i r], "lora_b": [r o]}}`, in every framework."""

TORCH_AXES = {2: (1, 0), 4: (3, 2, 0, 1)}
"""Axes of Flax's kernels, [i o] and [h w i o], in torch's order, [o i] and [o i h w]."""


def lora(params: Tree, ranks: Mapping[PatternKey, int], *, key: jax.Array) -> Adapters:
    """Returns new adapters for the kernels that the patterns select.

    Kernels are the arrays with two or four axes: dense `[i o]` and convolution `[h w i o]`. A leaf
    called `weight` has torch's order of axes, as in Equinox: `[o i]` and `[o i h w]`. Biases and
    scales below a pattern get no adapter.

    As in PEFT, `lora_a` is uniform in +-1/sqrt(inputs of an output) and `lora_b` is zero, so that
    the network's outputs do not change. The values of an adapter depend on the key and its path.

    Args:
      params: any pytree.
      ranks: rank by pattern, in order of precedence.
      key: random key.

    Returns:
      The adapters by the path of their kernel. They are a pytree: label, train and save them as any
      parameters.

    Raises:
      PatternError: a pattern selects nothing or no kernel, a kernel has three or more than four
        axes, or a rank is below 1 or above the smaller side of the kernel as a matrix.
      LabelError: two kernels share a path.

    Reference: Hu et al. 2021 (arXiv:2106.09685).

    Example:
      >>> params = {"body": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
      >>> adapters = lora(params, {"body": 2}, key=jax.random.key(0))
      >>> jax.tree.map(jnp.shape, adapters)
      {'body.kernel': {'lora_a': (4, 2), 'lora_b': (2, 3)}}
      >>> bool((merge_lora(params, adapters)["body"]["kernel"] == params["body"]["kernel"]).all())
      True
    """
    chosen, errors = match(params, list(ranks))
    leaves = [leaf for leaf in leaves_of(params) if leaf.value is not None]
    adapters: Adapters = {}
    for index, (pattern, rank) in enumerate(ranks.items()):
        selected = [leaf for i, leaf in zip(chosen, leaves, strict=True) if i == index]
        kernels = [leaf for leaf in selected if leaf.value.ndim > 1]
        if selected and not kernels:
            names = ", ".join(first_of([leaf.path for leaf in selected], 5))
            errors.append(f"pattern {pattern_text(pattern)!r} selects no kernel, only {names}.")
        for leaf in kernels:
            if leaf.path in adapters:
                raise LabelError(f"two kernels share the path {leaf.path!r}: rename one of them.")
            if error := _rank_error(leaf.path, leaf.value.shape, rank):
                errors.append(error)
            else:
                adapters[leaf.path] = _new_adapter(leaf, rank, key)
    if errors:
        raise PatternError("\n".join(f"lora: {error}" for error in errors))
    return adapters


def merge_lora(params: Tree, adapters: Adapters, *, alpha: float | None = None) -> Tree:
    """Returns the parameters with `kernel + alpha / rank * lora_a @ lora_b` for each adapter.

    It is differentiable: take gradients of `loss(merge_lora(params, adapters))` with respect to the
    adapters alone.

    Args:
      params: the parameters that `lora` received, or with other values.
      adapters: adapters of some of the kernels.
      alpha: PEFT's `lora_alpha`, the same for all ranks; None: each adapter's rank, a factor of 1.

    Returns:
      A tree with the structure and dtypes of `params`. The other leaves are the same arrays.

    Raises:
      LabelError: `params` has no kernel at the path of an adapter, or one of another shape.

    Example:
      loss = lambda adapters: cross_entropy(net.apply(merge_lora(params, adapters), x), y)
      gradients = jax.grad(loss)(adapters)
    """
    leaves = [leaf for leaf in leaves_of(params) if leaf.value is not None]
    known = {leaf.path: np.shape(leaf.value) for leaf in leaves if leaf.path in adapters}
    for path, adapter in adapters.items():
        shape = (*adapter[LORA_A].shape[:-1], adapter[LORA_B].shape[-1])
        if path not in known or _flax_shape(path, known[path]) != shape:
            found = f"one of shape {list(known[path])}" if path in known else "none"
            raise LabelError(
                f"an adapter for a kernel {list(shape)} has the path {path!r}, where params have "
                f"{found}. Pass the parameters that the adapters were made for."
            )
    return unflatten(
        params,
        [
            _merged(leaf.path, leaf.value, adapters[leaf.path], alpha)
            if leaf.path in adapters
            else leaf.value
            for leaf in leaves
        ],
    )


def is_adapter(path: str) -> bool:
    """Returns whether a path leads to an array of an adapter."""
    return path.rpartition(".")[2] in (LORA_A, LORA_B)


class MergedAdapter:
    """Stands for an array of an adapter that is merged, so that no pattern trains it."""


def hide_adapters(params: Tree) -> Tree:
    """Replaces each array of an adapter by a `MergedAdapter`.

    Raises:
      RecipeError: there are no adapters.
    """
    leaves = [leaf for leaf in leaves_of(params) if leaf.value is not None]
    if not any(is_adapter(leaf.path) for leaf in leaves):
        raise RecipeError("merge_lora has no adapters to merge: set the recipe's lora.")
    merged = [MergedAdapter() if is_adapter(leaf.path) else leaf.value for leaf in leaves]
    return unflatten(params, merged)


def _new_adapter(leaf: Leaf, rank: int, key: jax.Array) -> dict[str, jax.Array]:
    *inputs, out = _flax_shape(leaf.path, leaf.value.shape)
    bound = 1 / math.sqrt(math.prod(inputs))
    key = jax.random.fold_in(key, zlib.crc32(leaf.path.encode()))
    dtype = leaf.value.dtype
    drawn = jnp.promote_types(dtype, jnp.float32)
    a = jax.random.uniform(key, (*inputs, rank), drawn, -bound, bound)
    return {LORA_A: a.astype(dtype), LORA_B: jnp.zeros((rank, out), dtype)}


def _merged(
    path: str, kernel: jax.Array, adapter: Mapping[str, jax.Array], alpha: float | None
) -> jax.Array:
    a, b = adapter[LORA_A], adapter[LORA_B]
    # Small products, which accelerators would otherwise round to TF32 or bfloat16.
    change = jnp.tensordot(a, b, 1, precision="highest")
    if alpha is not None:
        change *= alpha / len(b)
    if _has_torch_axes(path):
        change = jnp.transpose(change, TORCH_AXES[change.ndim])
    return kernel + change.astype(kernel.dtype)


def _rank_error(path: str, shape: tuple[int, ...], rank: int) -> str:
    """Returns why a kernel cannot have an adapter of this rank; "" if it can."""
    if len(shape) not in TORCH_AXES:
        return (
            f"{path} {list(shape)} has {len(shape)} axes; an adapter needs a dense kernel [i o] or "
            "a convolution's [h w i o]. Leave it out of the patterns."
        )
    *inputs, out = _flax_shape(path, shape)
    most = min(math.prod(inputs), out)
    if 1 <= rank <= most:
        return ""
    return (
        f"the rank of {path} {list(shape)} is {rank}; it must be from 1 to {most}. An earlier "
        "pattern can give this kernel a smaller rank."
    )


def _flax_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a kernel's shape with Flax's order of axes."""
    if _has_torch_axes(path) and len(shape) in TORCH_AXES:
        return tuple(shape[axis] for axis in np.argsort(TORCH_AXES[len(shape)]))
    return tuple(shape)


def _has_torch_axes(path: str) -> bool:
    return path.rpartition(".")[2] == "weight"
