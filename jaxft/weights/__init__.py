"""Pretrained weights: from PyTorch's files, the hub and our own runs, and back."""

from jaxft.weights.load import from_state_dict, load
from jaxft.weights.read import Weights, read
from jaxft.weights.save import save

__all__ = ["Weights", "from_state_dict", "load", "read", "save"]
