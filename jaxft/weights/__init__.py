"""PyTorch's weight files, in and out."""

from jaxft.weights.load import load
from jaxft.weights.save import save

__all__ = ["load", "save"]
