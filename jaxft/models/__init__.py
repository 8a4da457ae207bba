"""Networks as pure functions on plain trees."""

from jaxft.models.model import Model, NormMode, Norms
from jaxft.models.registry import create, names

__all__ = ["Model", "NormMode", "Norms", "create", "names"]
