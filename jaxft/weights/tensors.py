"""Tensors that are read from their file when needed, independent of the file format."""

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
"""NumPy dtype by the name that safetensors uses."""


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file or in memory, read when needed.

    Attributes:
      shape: Shape in torch's layout.
      dtype: Dtype as safetensors names it: `F32`, `BF16`, `I64`.
      read: Returns a new array in torch's layout; raises WeightsError if the file is damaged.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def as_lazy(value: Any, name: str = "it") -> Any:
    """Converts an array of NumPy, jax or torch to a `LazyTensor`; returns other values unchanged.

    Args:
      value: An array, or a mapping (perhaps nested) whose values are converted. A dtype that
        safetensors has no name for keeps its NumPy or torch name. Byte order does not matter.
      name: Name of the tensor, for messages.
    """
    if isinstance(value, Mapping):
        return {key: as_lazy(x, str(key)) for key, x in value.items()}
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return value
    dtype = value.dtype
    if isinstance(dtype, np.dtype):
        dtype = dtype.newbyteorder("=")
    dtype = str(dtype).removeprefix("torch.")
    names = {str(numpy_dtype): name for name, numpy_dtype in DTYPES.items()}

    def read() -> np.ndarray:
        array = value
        try:
            if hasattr(array, "detach"):  # torch, which cannot convert bfloat16 to NumPy
                array = array.detach().cpu()
                array = array.float() if dtype == "bfloat16" else array
            return np.asarray(array)
        except (NotImplementedError, RuntimeError, TypeError) as error:  # sparse, meta, deleted
            reason = str(error).partition("\n")[0]
            raise WeightsError(f"{name} of the state dict cannot be read: {reason}") from error

    return LazyTensor(tuple(value.shape), names.get(dtype, dtype), read)
