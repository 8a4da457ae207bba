"""Precision of matrix products and convolutions of float32 arrays on accelerators."""

from collections.abc import Callable
from functools import wraps
from typing import Literal, ParamSpec, TypeVar

import jax

P = ParamSpec("P")
T = TypeVar("T")

MatmulPrecision = Literal["default", "high", "highest"]
"""As in `jax.default_matmul_precision`.

- `default`: the fastest: bfloat16 factors on TPU, TF32 on NVIDIA GPUs.
- `high`: three bfloat16 products on TPU, TF32 on NVIDIA GPUs.
- `highest`: float32.

A CPU always computes in float32. Products of bfloat16 arrays do not change.
"""


def with_precision(function: Callable[P, T], precision: MatmulPrecision) -> Callable[P, T]:
    """Returns a function that is traced with this precision, gradients included."""

    @wraps(function)
    def precise(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.default_matmul_precision(None if precision == "default" else precision):
            return function(*args, **kwargs)

    return precise
