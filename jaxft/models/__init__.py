"""Networks as pure functions on plain trees: registered networks and wrapped Flax modules."""

from jaxft.models.key_map import KeyMap, Rename
from jaxft.models.model import Model, NormMode, Norms
from jaxft.models.network_config import NetworkConfig, build_head
from jaxft.models.registry import create, names, register
from jaxft.models.user_linen import Linen
from jaxft.models.user_nnx import NNX

__all__ = [
    "NNX",
    "KeyMap",
    "Linen",
    "Model",
    "NetworkConfig",
    "NormMode",
    "Norms",
    "Rename",
    "build_head",
    "create",
    "names",
    "register",
]
