"""Pretrained weights: loads PyTorch files, hub repositories and jaxft runs; saves safetensors."""

from jaxft.weights.load import from_state_dict, load
from jaxft.weights.lora_file import load_lora, save_lora
from jaxft.weights.read import Weights, describe, read
from jaxft.weights.save import save

__all__ = [
    "Weights",
    "describe",
    "from_state_dict",
    "load",
    "load_lora",
    "read",
    "save",
    "save_lora",
]
