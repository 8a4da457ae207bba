"""Networks as pure functions on plain trees: registered networks and wrapped Flax modules."""

from jaxft.models.model import Model, NormMode, Norms
from jaxft.models.registry import create, names
from jaxft.models.user_linen import Linen
from jaxft.models.user_nnx import NNX

__all__ = ["NNX", "Linen", "Model", "NormMode", "Norms", "create", "names"]
