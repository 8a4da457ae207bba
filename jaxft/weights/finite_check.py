"""Refusal of weights that are not finite, and of running variances below 0."""

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jaxft.errors import WeightsError, first_of
from jaxft.labels import Tree, paths

_SHOWN = 5


def check_finite(source: str, names: Iterable[str], start: tuple[Tree, Tree]) -> None:
    """Checks the `(params, stats)` that a run is to start from; `names` are those of the leaves.

    XLA may drop NaN on CPU (in a relu followed by a mean), so such weights can train unnoticed.

    Raises:
      WeightsError: a value is NaN or infinite, or a running variance, of which networks take the
        root, is below 0; the message names the tensors.
    """
    params, stats = start
    variances = [False] * len(jax.tree.leaves(params))
    variances += [path.rpartition(".")[2] == "var" for path in paths(stats)]
    wrong, negative = [], []
    for name, tensor, is_variance in zip(names, jax.tree.leaves(start), variances, strict=True):
        array = np.asarray(tensor)
        if bad := int(array.size - np.isfinite(array).sum()):
            wrong.append(f"{name} ({bad:,} of {array.size:,} values)")
        elif is_variance and (bad := int((array < 0).sum())):
            negative.append(f"{name} ({bad:,} of {array.size:,} values)")
    if wrong:
        raise WeightsError(
            f"{source} holds NaN or infinity, in the network's float type, in {_shown(wrong)}. "
            "Start from other weights, such as an earlier checkpoint."
        )
    if negative:
        raise WeightsError(
            f"{source} holds running variances below 0, whose root is NaN, in {_shown(negative)}. "
            "Start from other weights; where these are a sum or difference of networks, take the "
            "statistics of one of them."
        )


def _shown(tensors: Sequence[str]) -> str:
    return ", ".join(first_of(tensors, _SHOWN, "and {} more tensors"))
