"""Checks weights for NaN, infinity and negative running variances."""

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jaxft.errors import WeightsError, first_of
from jaxft.labels import Tree, paths

_SHOWN = 5


def check_finite(source: str, names: Iterable[str], trees: tuple[Tree, Tree]) -> None:
    """Checks the `(params, stats)` that a run starts from.

    Without this check NaN could train unnoticed: XLA may drop it on CPU (in a relu followed by a
    mean).

    Args:
      source: Name of the weights, for the message.
      names: Names of the leaves, in their order.
      trees: `(params, stats)`.

    Raises:
      WeightsError: A value is NaN or infinite, or a running variance is below 0, so that its square
        root is NaN. The message names the tensors.
    """
    params, stats = trees
    is_variance = [False] * len(jax.tree.leaves(params))
    is_variance += [path.rpartition(".")[2] == "var" for path in paths(stats)]
    non_finite, negative = [], []
    for name, leaf, variance in zip(names, jax.tree.leaves(trees), is_variance, strict=True):
        array = np.asarray(leaf)
        if count := int(array.size - np.isfinite(array).sum()):
            non_finite.append(f"{name} ({count:,} of {array.size:,} values)")
        elif variance and (count := int((array < 0).sum())):
            negative.append(f"{name} ({count:,} of {array.size:,} values)")
    if non_finite:
        raise WeightsError(
            f"{source} holds NaN or infinity, in the network's float type, in "
            f"{_list_tensors(non_finite)}. Start from other weights, such as an earlier checkpoint."
        )
    if negative:
        raise WeightsError(
            f"{source} holds running variances below 0, whose square root is NaN, in "
            f"{_list_tensors(negative)}. Start from other weights. If these are a sum or "
            "difference of networks, use the running statistics of one of them."
        )


def _list_tensors(tensors: Sequence[str]) -> str:
    return ", ".join(first_of(tensors, _SHOWN, "and {} more tensors"))
