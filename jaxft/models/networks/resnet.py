"""Residual networks in Flax NNX, with torchvision's and timm's names and torch's arithmetic.

There are two layouts: the one for ImageNet (He et al. 2015, arXiv:1512.03385, as in
`torchvision.models.resnet` and `timm.models.resnet`) and the thinner one for CIFAR (section 4.2 of
the same paper). Activations are `[b h w c]`. Parameters are drawn in float32, whatever the compute
dtype.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.errors import RecipeError
from jaxft.models.batch_norm import BatchNorm
from jaxft.models.channel_attention import ChannelAttention, build_attention
from jaxft.models.context import Context
from jaxft.models.layers import (
    AveragePool,
    Conv,
    Dropout,
    Identity,
    Linear,
    MaxPool,
    Relu,
    Rngs,
    Sequential,
    relu,
)
from jaxft.models.network_config import (
    NetworkConfig,
    build_head,
    build_last_layer,
    drop_path_rates,
)


@dataclass(frozen=True)
class ResNetConfig(NetworkConfig):
    """Configuration of a `ResNet`."""

    layout: Literal["imagenet", "cifar"]
    """`imagenet`: a 7x7 stem, max pooling and 1x1 shortcuts. `cifar`: a 3x3 stem and shortcuts
    without parameters."""
    depths: tuple[int, ...]
    """Number of residual blocks in each of `layer1`, `layer2`, ..."""
    bottleneck: bool = False
    """Use `Bottleneck` blocks instead of `BasicBlock`."""
    groups: int = 1
    """Groups of the bottlenecks' 3x3 convolutions (ResNeXt, arXiv:1611.05431)."""
    base_width: int = 64
    """Channels per group in a layer of width 64; 128 with one group is a wide ResNet."""
    stem: tuple[int, int] | None = None
    """Widths of the first two of three 3x3 convolutions that replace the 7x7 convolution: (32, 32)
    is timm's `d` (arXiv:1812.01187), (24, 32) its `t`, (64, 64) its `s`."""
    average_shortcut: bool = False
    """Average 2x2 pixels before a shortcut's 1x1 convolution, which has stride 1 (`d`, `t`)."""
    attention: ChannelAttention | None = None
    """Channel attention at the end of each residual branch: `se` for SE-ResNets
    (arXiv:1709.01507), `eca` for ECA-ResNets (arXiv:1910.03151)."""
    stride_in_1x1: bool = False
    """Put a bottleneck's stride on its first 1x1 convolution (He et al., Caffe, Keras) instead of
    its 3x3 convolution (torchvision, known as v1.5). The parameters are the same."""
    concat_pool: bool = False
    """Use fastai's head: maximum and mean of each channel, then two linear layers. `dropout` is the
    rate before the last of them; the rate before the first is half of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head_layers and self.concat_pool:
            raise RecipeError(
                "concat_pool and head_layers define two different heads; leave one out"
            )
        if self.stride_in_1x1 and not self.bottleneck:
            raise RecipeError(
                "it has no bottlenecks, so stride_in_1x1 does not apply to it; use it with a "
                "network that has bottlenecks, such as resnet50"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each layer's 3x3 convolutions, for `base_width` 64 and one group."""
        first = 64 if self.layout == "imagenet" else 16
        return tuple(first * 2**i for i in range(len(self.depths)))

    @property
    def stem_width(self) -> int:
        """Number of channels of the stem's output."""
        return self.widths[0] if self.stem is None else 2 * self.stem[1]

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks: `stem`, `layer1`, ..., `head`."""
        return ("stem", *(f"layer{i + 1}" for i in range(len(self.depths))), "head")

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """Patterns that select the parameters of each block, in the order of `blocks`."""
        return (("conv1", "bn1"), *((layer,) for layer in self.blocks[1:-1]), (self.head,))

    @property
    def head(self) -> str:
        """Path of the classifier."""
        return "fc"


class BasicBlock(nnx.Module):
    """Residual block of two 3x3 convolutions."""

    expansion = 1

    def __init__(
        self,
        c_in: int,
        width: int,
        stride: int,
        drop_path: float,
        config: ResNetConfig,
        rngs: Rngs,
    ):
        self.conv1 = Conv(c_in, width, 3, stride, rngs=rngs)
        self.bn1 = BatchNorm(width)
        self.conv2 = Conv(width, width, 3, rngs=rngs)
        self.bn2 = BatchNorm(width)
        self.se = build_attention(config.attention, width, rngs)
        self.drop_path = Dropout(drop_path, rows=True)
        if config.layout == "imagenet" and (stride != 1 or c_in != width):
            self.downsample = projection_shortcut(c_in, width, stride, config, rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c_in]` to `[b h/stride w/stride width]`."""
        child = context.child
        y = relu(self.bn1(self.conv1(x, child("conv1")), child("bn1")))
        y = self.bn2(self.conv2(y, child("conv2")), child("bn2"))
        if hasattr(self, "downsample"):
            x = self.downsample(x, child("downsample"))
        elif x.shape != y.shape:
            x = padded_shortcut(x, y.shape[-1])
        return relu(self.drop_path(self.se(y, child("se")), context) + x)


class Bottleneck(nnx.Module):
    """Residual block of a 1x1, a 3x3 and a 1x1 convolution, with `4 * width` output channels."""

    expansion = 4

    def __init__(
        self,
        c_in: int,
        width: int,
        stride: int,
        drop_path: float,
        config: ResNetConfig,
        rngs: Rngs,
    ):
        c_out = self.expansion * width
        inner = width * config.base_width // 64 * config.groups
        stride1, stride2 = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = Conv(c_in, inner, 1, stride1, rngs=rngs)
        self.bn1 = BatchNorm(inner)
        self.conv2 = Conv(inner, inner, 3, stride2, config.groups, rngs=rngs)
        self.bn2 = BatchNorm(inner)
        self.conv3 = Conv(inner, c_out, 1, rngs=rngs)
        self.bn3 = BatchNorm(c_out)
        self.se = build_attention(config.attention, c_out, rngs)
        self.drop_path = Dropout(drop_path, rows=True)
        if stride != 1 or c_in != c_out:
            self.downsample = projection_shortcut(c_in, c_out, stride, config, rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c_in]` to `[b h/stride w/stride 4*width]`."""
        child = context.child
        y = relu(self.bn1(self.conv1(x, child("conv1")), child("bn1")))
        y = relu(self.bn2(self.conv2(y, child("conv2")), child("bn2")))
        y = self.bn3(self.conv3(y, child("conv3")), child("bn3"))
        if hasattr(self, "downsample"):
            x = self.downsample(x, child("downsample"))
        return relu(self.drop_path(self.se(y, child("se")), context) + x)


class ResNet(nnx.Module):
    """Residual network whose blocks can be applied separately."""

    def __init__(self, config: ResNetConfig, *, rngs: Rngs):
        c = config.stem_width
        self.imagenet = config.layout == "imagenet"
        self.concat_pool = config.concat_pool
        self.last_layer = config.blocks[-2]
        self.conv1 = build_stem(config, rngs)
        self.bn1 = BatchNorm(c)
        self.maxpool = MaxPool()
        block = Bottleneck if config.bottleneck else BasicBlock
        rates = iter(drop_path_rates(config, sum(config.depths)))
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            layer = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                layer.append(block(c, width, stride, next(rates), config, rngs))
                c = block.expansion * width
            setattr(self, f"layer{i + 1}", Sequential(layer))
        self.dropout = Dropout(0.0 if config.concat_pool else config.dropout)
        self.fc = (fastai_head if config.concat_pool else build_head)(c, config, rngs)

    def __call__(self, x: jax.Array, context: Context, blocks: Sequence[str]) -> jax.Array:
        """Applies consecutive `blocks` of `ResNetConfig.blocks`.

        Args:
          x: images `[b h w 3]`, or the output of the block before the first one.
          context: settings of the call.
          blocks: names of the blocks to apply.

        Returns:
          Activations `[b h w c]`, features `[b c]` after the last layer, or logits `[b k]` in the
          wider dtype of features and parameters.
        """
        for name in blocks:
            if name == "stem":
                x = self._stem(x, context)
            elif name == "head":
                x = self._head(x, context)
            else:
                x = getattr(self, name)(x, context.child(name))
                x = self._pool(x) if name == self.last_layer else x
        return x

    def _stem(self, x: jax.Array, context: Context) -> jax.Array:
        x = self.conv1(x, context.child("conv1"))
        x = relu(self.bn1(x, context.child("bn1")))
        return self.maxpool(x, context) if self.imagenet else x

    def _pool(self, x: jax.Array) -> jax.Array:
        """Maps `[b h w c]` to `[b c]`, with `concat_pool` to `[b 2c]`."""
        mean = x.mean((1, 2))
        if not self.concat_pool:
            return mean
        # Not x.max: its gradient compares x with the maximum. XLA may recompute x with other
        # rounding for that; then no value is equal, and the gradient is NaN.
        pixels = x.reshape(x.shape[0], -1, x.shape[-1])
        indices = pixels.argmax(1, keepdims=True)
        maximum = jnp.take_along_axis(pixels, indices, 1)[:, 0]
        return jnp.concatenate([maximum, mean], -1)

    def _head(self, features: jax.Array, context: Context) -> jax.Array:
        dropped = self.dropout(features, context.child("dropout"))
        return self.fc(dropped, context.child("fc"))


def build_stem(config: ResNetConfig, rngs: Rngs) -> Conv | Sequential:
    """Builds the convolutions before `bn1`; they have stride 2 for ImageNet and 1 for CIFAR."""
    c = config.stem_width
    if config.layout == "cifar":
        return Conv(3, c, 3, rngs=rngs)
    if config.stem is None:
        return Conv(3, c, 7, 2, rngs=rngs)
    first, second = config.stem
    return Sequential(
        [
            *(Conv(3, first, 3, 2, rngs=rngs), BatchNorm(first), Relu()),
            *(Conv(first, second, 3, rngs=rngs), BatchNorm(second), Relu()),
            Conv(second, c, 3, rngs=rngs),
        ]
    )


def projection_shortcut(
    c_in: int, c_out: int, stride: int, config: ResNetConfig, rngs: Rngs
) -> Sequential:
    """Builds shortcut B of He et al.: a 1x1 convolution and a norm layer."""
    if not config.average_shortcut:
        return Sequential([Conv(c_in, c_out, 1, stride, rngs=rngs), BatchNorm(c_out)])
    pool = AveragePool() if stride == 2 else Identity()
    return Sequential([pool, Conv(c_in, c_out, 1, rngs=rngs), BatchNorm(c_out)])


def padded_shortcut(x: jax.Array, c_out: int) -> jax.Array:
    """Computes shortcut A of He et al.: every other pixel, zero-padded to `c_out` channels.

    Half of the zero channels come before the others, half after them.
    """
    x = x[:, ::2, ::2]
    extra = c_out - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


def fastai_head(c: int, config: ResNetConfig, rngs: Rngs) -> Sequential:
    """Builds fastai's `create_head` without its pooling: norm, dropout and linear layer, twice.

    The linear layers have no bias and start from He's initialisation, as in fastai.
    """
    hidden = 512
    return Sequential(
        [
            *(BatchNorm(2 * c), Dropout(config.dropout / 2)),
            *(Linear(2 * c, hidden, bias=False, std=math.sqrt(1 / c), rngs=rngs), Relu()),
            *(BatchNorm(hidden), Dropout(config.dropout)),
            build_last_layer(hidden, config, rngs, std=math.sqrt(2 / hidden), bias=False),
        ]
    )
