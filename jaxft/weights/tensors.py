"""A tensor that lies in a file, whatever the file's form."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.errors import WeightsError

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""numpy's dtype for each name that safetensors has for one."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file, read when asked for."""

    shape: tuple[int, ...]
    dtype: str
    """As safetensors names it: `F32`, `BF16`, `I64`."""
    read: Callable[[], np.ndarray]
    """A fresh array in torch's layout; raises WeightsError where the file is damaged."""


def in_memory(value: Any, name: str = "it") -> Any:
    """Returns a `LazyTensor` of an array of NumPy, jax or torch; anything else as it is.

    In a mapping, also a nested one, each value becomes one. A dtype that safetensors has no name
    for stays by its own; byte order does not matter.
    """
    if isinstance(value, Mapping):
        return {key: in_memory(x, str(key)) for key, x in value.items()}
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return value
    dtype = value.dtype
    if isinstance(dtype, np.dtype):
        dtype = dtype.newbyteorder("=")
    dtype = str(dtype).removeprefix("torch.")
    names = {str(known): name for name, known in DTYPES.items()}

    def read() -> np.ndarray:
        array = value
        try:
            if hasattr(array, "detach"):  # torch's, which gives NumPy no bfloat16
                array = array.detach().cpu()
                array = array.float() if dtype == "bfloat16" else array
            return np.asarray(array)
        except (NotImplementedError, RuntimeError, TypeError) as error:  # sparse, meta, deleted
            reason = str(error).partition("\n")[0]
            raise WeightsError(f"{name} of the state dict cannot be read: {reason}") from error

    return LazyTensor(tuple(value.shape), names.get(dtype, dtype), read)
