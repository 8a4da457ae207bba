"""Weights for comparisons with torch, drawn alike on both sides."""

import zlib

import numpy as np


def weight(name, shape):
    """A tensor in torch's layout, float64: a function of its name."""
    normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    if len(shape) > 1:
        return normal * np.sqrt(2 / np.prod(shape[1:]))
    return (1 + normal.clip(-2, 2) / 4) if name.endswith(("weight", "var")) else normal / 10
