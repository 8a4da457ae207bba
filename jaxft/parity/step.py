"""What one training step tells of itself, on either side: plain arrays by torch's names."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class Rows(NamedTuple):
    """A batch."""

    images: np.ndarray
    """Normalised floats, [b h w c]."""
    targets: np.ndarray
    """Classes, int [b]."""


@dataclass(frozen=True)
class Step:
    """A step's parts in causal order: each follows from those before it.

    Arrays of parameters and statistics are in torch's layouts.

    Attributes:
      rates: the learning rate of each parameter that trains.
      outputs: of each block of the network, [b h w c] or [b k], before the step's update.
      loss: what is minimised, without the penalty of an anchor.
      stats: the norm layers' running statistics after the step.
      grads: of each parameter that trains, before clipping.
      moments: what the optimizer remembers of each element of a parameter, after the step.
      params: all parameters after the step.
    """

    rates: Arrays
    outputs: Arrays
    loss: Arrays
    stats: Arrays
    grads: Arrays
    moments: Arrays
    params: Arrays
