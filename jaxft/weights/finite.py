"""Refusal of weights that are not finite."""

from collections.abc import Iterable

import jax
import numpy as np

from jaxft.errors import WeightsError

_SHOWN = 5


def check_finite(source: str, tensors: Iterable[tuple[str, jax.Array | np.ndarray]]) -> None:
    """Checks parameters and running statistics that a run is to start from, given with names.

    XLA may drop NaN on CPU (in a relu followed by a mean), so such weights can train unnoticed.

    Raises:
      WeightsError: a value is NaN or infinite; the message names the tensors.
    """
    wrong = []
    for name, tensor in tensors:
        array = np.asarray(tensor)
        if bad := int(array.size - np.isfinite(array).sum()):
            wrong.append(f"{name} ({bad:,} of {array.size:,} values)")
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more tensors" if len(wrong) > _SHOWN else ""
        raise WeightsError(
            f"{source} holds NaN or infinity, in the network's float type, in "
            f"{', '.join(wrong[:_SHOWN])}{more}. Start from other weights, such as an earlier "
            "checkpoint."
        )
