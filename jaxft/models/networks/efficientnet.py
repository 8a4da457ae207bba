"""EfficientNet and MobileNetV3 in Flax NNX, with timm's names.

Both stack inverted residual blocks (Tan and Le 2019, arXiv:1905.11946; Howard et al. 2019,
arXiv:1905.02244). Activations are `[b h w c]`. Parameters are drawn in float32, whatever the
compute dtype.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.batch_norm import BatchNorm
from jaxft.models.channel_attention import Activation, Pointwise, squeeze_excite
from jaxft.models.context import Context
from jaxft.models.layers import Conv, Dropout, Identity, Rngs, Sequential, make_divisible, relu
from jaxft.models.network_config import NetworkConfig, build_head


def hard_sigmoid(x: jax.Array) -> jax.Array:
    """Computes `torch.nn.Hardsigmoid`."""
    return jnp.clip(x + 3, 0, 6) / 6


def hard_swish(x: jax.Array) -> jax.Array:
    """Computes `torch.nn.Hardswish`."""
    return x * hard_sigmoid(x)


_ACTIVATIONS: dict[str, Activation] = {
    "relu": relu,
    "silu": jax.nn.silu,
    "hard_swish": hard_swish,
}


@dataclass(frozen=True)
class BlockConfig:
    """Configuration of the blocks in a stage that have the same shapes."""

    repeats: int
    """Number of blocks; the first one has the stride."""
    size: int
    """Side of the depthwise kernel."""
    stride: int
    expansion: float | None
    """Channels of the depthwise convolution relative to the input's. 1: none, the depthwise
    convolution comes first. None: a 1x1 convolution instead of a residual block."""
    width: int
    """Output channels, for a width multiplier of 1."""
    squeeze_excite: bool = False
    activation: Literal["relu"] | None = None
    """Activation in place of the network's."""


@dataclass(frozen=True)
class EfficientNetConfig(NetworkConfig):
    """Configuration of an `EfficientNet`."""

    stages: tuple[tuple[BlockConfig, ...], ...]
    """Blocks of `blocks.0`, `blocks.1`, ..."""
    stem_width: int
    """Channels of the stem's output."""
    features: int
    """Number of features before the classifier."""
    width_multiplier: float = 1.0
    """Factor of the blocks' output channels."""
    activation: Literal["silu", "hard_swish"] = "silu"
    """Activation of EfficientNet (`silu`) or MobileNetV3."""
    mobile: bool = False
    """Use the parts in which MobileNetV3 differs: it averages pixels before the last convolution,
    which has a bias and no norm layer. Squeeze-and-excitation has a hard sigmoid, and its width
    follows from the width of the expansion."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks: `stem`, `blocks.0`, ..., `conv_head`, `head`."""
        stages = (f"blocks.{i}" for i in range(len(self.stages)))
        return ("stem", *stages, "conv_head", "head")

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """Patterns that select the parameters of each block, in the order of `blocks`."""
        last = ("conv_head",) if self.mobile else ("conv_head", "bn2")
        stages = ((name,) for name in self.blocks[1:-2])
        return (("conv_stem", "bn1"), *stages, last, (self.head,))

    @property
    def head(self) -> str:
        """Path of the classifier."""
        return "classifier"


class SqueezeExcite(nnx.Module):
    """Squeeze-and-excitation with the names of `timm.models._efficientnet_blocks`."""

    def __init__(self, c: int, hidden: int, activation: Activation, mobile: bool, rngs: Rngs):
        self.conv_reduce = Pointwise(c, hidden, zero_bias=True, rngs=rngs)
        self.conv_expand = Pointwise(hidden, c, zero_bias=True, rngs=rngs)
        self.activation = relu if mobile else activation
        self.gate = hard_sigmoid if mobile else jax.nn.sigmoid

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Scales the channels of `[b h w c]`."""
        return squeeze_excite(x, self.conv_reduce, self.conv_expand, self.activation, self.gate)


class ConvBlock(nnx.Module):
    """A 1x1 convolution, norm layer and activation."""

    def __init__(self, c_in: int, c_out: int, activation: Activation, rngs: Rngs):
        self.conv = Conv(c_in, c_out, 1, rngs=rngs)
        self.bn1 = BatchNorm(c_out)
        self.activation = activation

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c_in]` to `[b h w c_out]`."""
        y = self.conv(x, context.child("conv"))
        return self.activation(self.bn1(y, context.child("bn1")))


class InvertedResidual(nnx.Module):
    """Residual block of a 1x1, a depthwise and a 1x1 convolution (Sandler et al. 2018).

    With `expansion` 1 the first of them is missing, and the others have timm's other names.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        stride: int,
        drop_path: float,
        block: BlockConfig,
        config: EfficientNetConfig,
        rngs: Rngs,
    ):
        self.activation = _ACTIVATIONS[block.activation or config.activation]
        self.is_residual = stride == 1 and c_in == c_out
        self.expands = block.expansion != 1
        c = make_divisible(c_in * (block.expansion or 1)) if self.expands else c_in
        if self.expands:
            self.conv_pw = Conv(c_in, c, 1, rngs=rngs)
        std = math.sqrt(2) / block.size  # timm's fan-out is a group's
        self.conv_dw = Conv(c, c, block.size, stride, c, std=std, rngs=rngs)
        hidden = make_divisible(c / 4) if config.mobile else round(c_in / 4)
        self.se = (
            SqueezeExcite(c, hidden, self.activation, config.mobile, rngs)
            if block.squeeze_excite
            else Identity()
        )
        setattr(self, "conv_pwl" if self.expands else "conv_pw", Conv(c, c_out, 1, rngs=rngs))
        for i, width in enumerate((c, c, c_out) if self.expands else (c, c_out)):
            setattr(self, f"bn{i + 1}", BatchNorm(width))
        self.drop_path = Dropout(drop_path, rows=True)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c_in]` to `[b h/stride w/stride c_out]`."""

        def step(conv: str, norm: str, x: jax.Array) -> jax.Array:
            x = getattr(self, conv)(x, context.child(conv))
            return getattr(self, norm)(x, context.child(norm))

        if self.expands:
            y = self.activation(step("conv_pw", "bn1", x))
            y = self.activation(step("conv_dw", "bn2", y))
            y = step("conv_pwl", "bn3", self.se(y, context.child("se")))
        else:
            y = self.activation(step("conv_dw", "bn1", x))
            y = step("conv_pw", "bn2", self.se(y, context.child("se")))
        return self.drop_path(y, context) + x if self.is_residual else y


class EfficientNet(nnx.Module):
    """EfficientNet or MobileNetV3 whose blocks can be applied separately."""

    def __init__(self, config: EfficientNetConfig, *, rngs: Rngs):
        self.mobile = config.mobile
        self.activation = _ACTIVATIONS[config.activation]
        c = config.stem_width
        self.conv_stem = Conv(3, c, 3, 2, rngs=rngs)
        self.bn1 = BatchNorm(c)
        index, count = 0, sum(block.repeats for stage in config.stages for block in stage)
        stages = []
        for stage in config.stages:
            layers: list[ConvBlock | InvertedResidual] = []
            for block in stage:
                c_out = make_divisible(block.width * config.width_multiplier)
                for i in range(block.repeats):
                    if block.expansion is None:
                        layers.append(ConvBlock(c, c_out, self.activation, rngs))
                    else:
                        stride = 1 if i else block.stride
                        rate = config.drop_path * index / count  # as in timm, below `drop_path`
                        layers.append(InvertedResidual(c, c_out, stride, rate, block, config, rngs))
                    c, index = c_out, index + 1
            stages.append(Sequential(layers))
        self.blocks = Sequential(stages)
        self.conv_head = (
            Pointwise(c, config.features, zero_bias=True, rngs=rngs)
            if config.mobile
            else Conv(c, config.features, 1, rngs=rngs)
        )
        if not config.mobile:
            self.bn2 = BatchNorm(config.features)
        self.dropout = Dropout(config.dropout)
        self.classifier = build_head(config.features, config, rngs)

    def __call__(self, x: jax.Array, context: Context, blocks: Sequence[str]) -> jax.Array:
        """Applies consecutive `blocks` of `EfficientNetConfig.blocks`.

        Args:
          x: images `[b h w 3]`, or the output of the block before the first one.
          context: settings of the call.
          blocks: names of the blocks to apply.

        Returns:
          Activations `[b h w c]`, features `[b c]` after `conv_head`, or logits `[b k]` in the
          wider dtype of features and parameters.
        """
        for name in blocks:
            if name == "stem":
                x = self.conv_stem(x, context.child("conv_stem"))
                x = self.activation(self.bn1(x, context.child("bn1")))
            elif name == "conv_head":
                x = self._features(x, context)
            elif name == "head":
                x = self._head(x, context)
            else:
                x = self.blocks[int(name.removeprefix("blocks."))](x, context.child(name))
        return x

    def _features(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c]` to `[b features]`."""
        x = self.conv_head(x.mean((1, 2)) if self.mobile else x, context.child("conv_head"))
        if self.mobile:
            return self.activation(x)
        return self.activation(self.bn2(x, context.child("bn2"))).mean((1, 2))

    def _head(self, features: jax.Array, context: Context) -> jax.Array:
        dropped = self.dropout(features, context.child("dropout"))
        return self.classifier(dropped, context.child("classifier"))
