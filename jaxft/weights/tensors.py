"""A tensor that lies in a file, whatever the file's form."""

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np

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
