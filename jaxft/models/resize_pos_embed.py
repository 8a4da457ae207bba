"""Resizes position embeddings to another image size, bit for bit as torch and timm do.

timm's `resample_abs_pos_embed` calls `torch.nn.functional.interpolate` in bicubic mode with
`antialias=True`, in float32. The result here has the same bits as torch's on x86 CPUs, which
multiply and add with one rounding wherever the compiler does not vectorise.
"""

import math
from typing import Any

import numpy as np

_A = -0.5  # the cubic kernel's parameter, as in Pillow
_VECTOR = 4  # taps that torch multiplies at once, and rounds before it adds them


def resize_pos_embed(
    positions: np.ndarray, shape: tuple[int, ...], num_prefix_tokens: int
) -> np.ndarray:
    """Resizes position embeddings of a square grid of patches to another square grid.

    Args:
      positions: `[1 n c]`, of the prefix tokens and the patches.
      shape: shape of the result, `[1 m c]`.
      num_prefix_tokens: number of prefix tokens, whose embeddings stay as they are.

    Raises:
      ValueError: the shapes do not fit each other, or a grid is not square.
    """
    sides = [math.isqrt(max(0, x[1] - num_prefix_tokens)) for x in (positions.shape, shape)]
    for side, x in zip(sides, (positions.shape, shape), strict=True):
        if len(x) != 3 or x[::2] != shape[::2] or not side or side**2 + num_prefix_tokens != x[1]:
            raise ValueError(f"cannot resize position embeddings of {positions.shape} to {shape}")
    old, new = sides
    prefix, patches = np.split(positions, [num_prefix_tokens], axis=1)
    grid = patches.astype(np.float32).reshape(old, old, -1).swapaxes(0, 1)
    for _ in range(2):  # columns, then rows
        grid = _resize_rows(grid, new).swapaxes(0, 1)
    grid = grid.swapaxes(0, 1).reshape(1, new**2, -1)
    return np.concatenate([prefix, grid.astype(positions.dtype)], 1)


def _resize_rows(x: np.ndarray, size: int) -> np.ndarray:
    """Resamples the first axis of an array in float32."""
    rows = []
    for i in range(size):
        first, weights = _filter(i, len(x), size)
        row = x[first] * weights[0]
        num_vectorised = (len(weights) - 1) // _VECTOR * _VECTOR
        for j, weight in enumerate(weights[1:], 1):
            is_vectorised = j <= num_vectorised
            tap = x[first + j]
            row = row + tap * weight if is_vectorised else _multiply_add(tap, weight, row)
        rows.append(row)
    return np.stack(rows)


def _filter(i: int, old: int, new: int) -> tuple[int, np.ndarray]:
    """Returns the first old position of the new position `i`, and the weights from there on."""
    single, double = np.float32, np.float64
    scale = single(old) / single(new)
    stretch = max(scale, single(1))
    support, inverse = 2 * stretch, single(1 / double(stretch))
    center = single(double(scale) * (i + 0.5))
    first = max(int(double(center - support) + 0.5), 0)
    last = min(int(double(center + support) + 0.5), old)
    distances = (np.arange(first, last).astype(single) - center).astype(double) + 0.5
    weights = _cubic(np.abs(distances * inverse).astype(single))
    total = single(0)
    for weight in weights:  # in this order
        total += weight
    return first, weights / total


def _cubic(x: np.ndarray) -> np.ndarray:
    """Computes the cubic convolution kernel (Keys 1981) at `x` at least 0."""
    a, one = np.float32(_A), np.float32(1)
    near = _multiply_add(_multiply_add(a + 2, x, -(a + 3)) * x, x, one)
    far = _multiply_add(_multiply_add(_multiply_add(a, x, -5 * a), x, 8 * a), x, -4 * a)
    return np.where(x < 1, near, np.where(x < 2, far, 0)).astype(np.float32)


def _multiply_add(x: Any, y: Any, z: Any) -> np.ndarray:
    """Computes x y + z in float32 with one rounding; the product is exact in float64."""
    return (np.multiply(x, y, dtype=np.float64) + z).astype(np.float32)
