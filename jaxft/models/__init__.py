"""Networks as pure functions on plain trees: the registry's, and modules of the user's own."""

from jaxft.models.model import Model, NormMode, Norms
from jaxft.models.registry import create, names
from jaxft.models.user_linen import Linen
from jaxft.models.user_nnx import NNX

__all__ = ["NNX", "Linen", "Model", "NormMode", "Norms", "create", "names"]
