"""Options that all networks of the registry share, and the classifier that these define."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal, get_args

import jax
from flax import nnx

from jaxft.errors import RecipeError
from jaxft.models.layers import BinaryLinear, Linear, Relu, Rngs, Sequential

Dtype = Literal["float32", "bfloat16", "float64"]
"""Compute dtype of a network."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig(ABC):
    """Options of all networks; the configuration of a network adds its own.

    A subclass defines `blocks`; `block_patterns`, if they are not the names of the blocks; and a
    field `image_size`, if the shapes of parameters depend on the size of the images.

    Raises:
      RecipeError: if an option is wrong.
    """

    num_classes: int = 1000
    """Number of logits."""
    head_layers: tuple[int | Literal["relu"], ...] = ()
    """Layers of the head before the last linear layer: widths of linear layers, and "relu"."""
    binary: bool = False
    """Predict two classes with one logit z: the last layer has one output; logits are (0, z)."""
    dropout: float = 0.0
    """Dropout rate before the head."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last residual block. It grows linearly from 0 in the first; in
    EfficientNet the last block stays a step below it, as in timm."""
    dtype: Dtype | None = None
    """Compute dtype of all blocks before the head; None uses the dtype of the images. With
    "float64" parameters and statistics are float64 too."""

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise RecipeError(f"num_classes is {self.num_classes}; it must be at least 1")
        for option in ("dropout", "drop_path"):
            if not 0 <= (rate := getattr(self, option)) < 1:
                raise RecipeError(f"{option} is {rate}; it must be at least 0 and below 1")
        object.__setattr__(self, "head_layers", tuple(self.head_layers))  # a list in JSON
        widths = [x for x in self.head_layers if x != "relu"]
        if invalid := [x for x in widths if not (isinstance(x, int) and x >= 1)]:
            raise RecipeError(
                f"head_layers has {invalid[0]!r}; each must be a width of at least 1 or 'relu'"
            )
        if self.binary and self.num_classes != 2:
            raise RecipeError(f"binary needs two classes, not {self.num_classes}; leave it out")
        if self.dtype not in (None, *get_args(Dtype)):
            choices = ", ".join(get_args(Dtype))
            raise RecipeError(f"dtype is {self.dtype!r}; it must be one of {choices}, or None")
        if self.dtype == "float64" and jax.dtypes.canonicalize_dtype(float) != "float64":
            raise RecipeError(
                "dtype is 'float64', but JAX computes in float32. Turn float64 on: set the "
                "environment variable JAX_ENABLE_X64=1, or call "
                "jax.config.update('jax_enable_x64', True) before any array is created."
            )

    @property
    @abstractmethod
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks, from input to output; the last one is the head."""

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """Patterns that select the parameters of each block: its name, and the path of the head."""
        return (*((block,) for block in self.blocks[:-1]), (self.head,))

    @property
    def head(self) -> str:
        """Path of the classifier."""
        return "head"

    @property
    def param_dtype(self) -> str:
        """Dtype of parameters and statistics, never half precision."""
        return "float64" if self.dtype == "float64" else "float32"


def drop_path_rates(config: NetworkConfig, count: int) -> list[float]:
    """Returns the stochastic depth rates of `count` residual blocks, from input to output."""
    return [config.drop_path * i / max(1, count - 1) for i in range(count)]


def build_head(
    c: int, config: NetworkConfig, rngs: Rngs, *, std: float | None = None
) -> Linear | Sequential:
    """Builds the classifier for features of `c` channels: a linear layer or a `Sequential`.

    `std` initialises the linear layers as in `Linear`.
    """
    layers: list[nnx.Module] = []
    for width in config.head_layers:
        if width == "relu":
            layers.append(Relu())
        else:
            layers.append(Linear(c, width, std=std, rngs=rngs))
            c = width
    last = build_last_layer(c, config, rngs, std=std)
    return Sequential([*layers, last]) if layers else last


def build_last_layer(
    c: int, config: NetworkConfig, rngs: Rngs, *, std: float | None = None, bias: bool = True
) -> Linear:
    """Builds the layer that outputs the logits."""
    if config.binary:
        return BinaryLinear(c, 1, std=std, bias=bias, rngs=rngs)
    return Linear(c, config.num_classes, std=std, bias=bias, rngs=rngs)
