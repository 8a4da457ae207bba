"""The record of one training step, as NumPy arrays with torch's names."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class NumpyBatch(NamedTuple):
    """A batch of images."""

    images: np.ndarray
    """Normalised images `[b h w c]`, floats."""
    targets: np.ndarray
    """Classes `[b]`, integers."""


@dataclass(frozen=True)
class Step:
    """One training step; each field depends only on the fields before it.

    Parameters and statistics have torch's layouts.

    Attributes:
      lr: learning rate of each trained parameter.
      outputs: output of each block before the step's update, `[b h w c]` or `[b k]`.
      loss: the training loss, without an anchor's penalty.
      stats: running statistics of the norm layers after the step.
      grads: gradient of each trained parameter, before clipping.
      moments: the optimizer's moments of each trained parameter, after the step.
      params: all parameters after the step.
    """

    lr: Arrays
    outputs: Arrays
    loss: Arrays
    stats: Arrays
    grads: Arrays
    moments: Arrays
    params: Arrays
