"""Residual networks in Flax NNX, with torchvision's and timm's names and torch's arithmetic.

Two layouts: ImageNet's (He et al. 2015, arXiv:1512.03385, as in `torchvision.models.resnet` and
`timm.models.resnet`) and the thinner CIFAR one of the same paper's section 4.2. Activations are
`[b h w c]`. Parameters are drawn in float32, whatever the compute dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.batch_norm import BatchNorm
from jaxft.models.context import Context
from jaxft.models.layers import (
    AveragePool,
    Conv,
    Dropout,
    Identity,
    Linear,
    MaxPool,
    Relu,
    Sequential,
    relu,
)
from jaxft.models.rngs import Rngs


@dataclass(frozen=True)
class ResNetConfig:
    """What tells one ResNet from another."""

    layout: Literal["imagenet", "cifar"]
    depths: tuple[int, ...]
    """Residual blocks in each of `layer1`, `layer2`, ..."""
    bottleneck: bool = False
    groups: int = 1
    """Of the bottlenecks' 3x3 convolutions (ResNeXt, arXiv:1611.05431)."""
    base_width: int = 64
    """Channels of a group where the layer has 64; 128 with one group is a wide ResNet."""
    stem: tuple[int, int] | None = None
    """Three 3x3 convolutions instead of one 7x7, the first two of these widths: (32, 32) is
    timm's `d` (arXiv:1812.01187), (24, 32) its `t`, (64, 64) its `s`."""
    average_shortcut: bool = False
    """Shortcuts average 2x2 pixels before a 1x1 convolution that no longer strides (`d`, `t`)."""
    stride_in_1x1: bool = False
    """Where a down-sampling bottleneck strides: on its first 1x1 convolution (He et al., Caffe,
    Keras) or on its 3x3 (torchvision, known as v1.5). The parameters are the same."""
    num_classes: int = 1000
    concat_pool: bool = False
    """fastai's head: maximum and mean of each channel, then two linear layers."""
    head_layers: tuple[int | Literal["relu"], ...] = ()
    """Before the last linear layer: the widths of others, and ReLU."""
    binary: bool = False
    """Two classes with one logit z: the last layer has one output, the network's is (0, z)."""
    dropout: float = 0.0
    """Before the head; with `concat_pool` before the last linear layer, half of it before the
    first."""
    drop_path: float = 0.0
    """Stochastic depth of the last residual block; it grows linearly from 0 in the first."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """Of all between stem and head; None: that of the images. With float64, parameters and
    statistics are float64 too."""

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each layer's 3x3 convolutions in a network of one 64-wide group."""
        first = 64 if self.layout == "imagenet" else 16
        return tuple(first * 2**i for i in range(len(self.depths)))

    @property
    def stem_width(self) -> int:
        """Channels that the stem hands to `layer1`."""
        return self.widths[0] if self.stem is None else 2 * self.stem[1]

    @property
    def blocks(self) -> tuple[str, ...]:
        """`stem`, `layer1`, ..., `head`."""
        return ("stem", *(f"layer{i + 1}" for i in range(len(self.depths))), "head")

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """The patterns that select each block's parameters, in the order of `blocks`."""
        return (("conv1", "bn1"), *((layer,) for layer in self.blocks[1:-1]), (self.head,))

    @property
    def head(self) -> str:
        """The path of the classifier."""
        return "fc"

    @property
    def param_dtype(self) -> str:
        """The dtype of parameters and statistics; half precision is for computing only."""
        return "float64" if self.dtype == "float64" else "float32"


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut."""

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
        self.drop_path = Dropout(drop_path, rows=True)
        if config.layout == "imagenet" and (stride != 1 or c_in != width):
            self.downsample = projection(c_in, width, stride, config, rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`[b h w c_in]` to `[b h/stride w/stride width]`."""
        at = context.below
        y = relu(self.bn1(self.conv1(x, at("conv1")), at("bn1")))
        y = self.bn2(self.conv2(y, at("conv2")), at("bn2"))
        if hasattr(self, "downsample"):
            x = self.downsample(x, at("downsample"))
        elif x.shape != y.shape:
            x = subsample(x, y.shape[-1])
        return relu(self.drop_path(y, context) + x)


class Bottleneck(nnx.Module):
    """A 3x3 convolution between two 1x1, beside a shortcut; four times as wide outside."""

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
        self.drop_path = Dropout(drop_path, rows=True)
        if stride != 1 or c_in != c_out:
            self.downsample = projection(c_in, c_out, stride, config, rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`[b h w c_in]` to `[b h/stride w/stride 4*width]`."""
        at = context.below
        y = relu(self.bn1(self.conv1(x, at("conv1")), at("bn1")))
        y = relu(self.bn2(self.conv2(y, at("conv2")), at("bn2")))
        y = self.bn3(self.conv3(y, at("conv3")), at("bn3"))
        if hasattr(self, "downsample"):
            x = self.downsample(x, at("downsample"))
        return relu(self.drop_path(y, context) + x)


class ResNet(nnx.Module):
    """The network; `blocks` of its call are a run of `ResNetConfig.blocks`."""

    def __init__(self, config: ResNetConfig, *, rngs: Rngs):
        c = config.stem_width
        self.dtype = config.dtype
        self.imagenet = config.layout == "imagenet"
        self.concat_pool = config.concat_pool
        self.last_layer = config.blocks[-2]
        self.binary = config.binary
        self.conv1 = stem(config, rngs)
        self.bn1 = BatchNorm(c)
        self.maxpool = MaxPool()
        block = Bottleneck if config.bottleneck else BasicBlock
        number, last = 0, max(1, sum(config.depths) - 1)
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            layer = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                layer.append(
                    block(c, width, stride, config.drop_path * number / last, config, rngs)
                )
                c, number = block.expansion * width, number + 1
            setattr(self, f"layer{i + 1}", Sequential(layer))
        self.dropout = Dropout(0.0 if config.concat_pool else config.dropout)
        self.fc = head(c, config, rngs)

    def __call__(self, x: jax.Array, context: Context, blocks: Sequence[str]) -> jax.Array:
        """The output of the last of `blocks`, given the input `x` of the first.

        Images are `[b h w 3]`; the last layer hands features `[b c]` to the head; logits `[b k]`
        have the wider dtype of features and parameters.
        """
        for name in blocks:
            if name == "stem":
                x = self._stem(x, context)
            elif name == "head":
                x = self._head(x, context)
            else:
                x = getattr(self, name)(x, context.below(name))
                x = self._pool(x) if name == self.last_layer else x
        return x

    def _stem(self, x: jax.Array, context: Context) -> jax.Array:
        x = x if self.dtype is None else x.astype(self.dtype)
        x = self.conv1(x, context.below("conv1"))
        x = relu(self.bn1(x, context.below("bn1")))
        return self.maxpool(x, context) if self.imagenet else x

    def _pool(self, x: jax.Array) -> jax.Array:
        """`[b h w c]` to `[b c]`, with `concat_pool` to `[b 2c]`."""
        mean = x.mean((1, 2))
        if not self.concat_pool:
            return mean
        # Not x.max: its gradient looks for the maximum by equality, and XLA may compute x once more
        # for that, by other roundings; then it is found nowhere, and the gradient is NaN.
        pixels = x.reshape(x.shape[0], -1, x.shape[-1])
        where = pixels.argmax(1, keepdims=True)
        maximum = jnp.take_along_axis(pixels, where, 1)[:, 0]
        return jnp.concatenate([maximum, mean], -1)

    def _head(self, features: jax.Array, context: Context) -> jax.Array:
        dropped = self.dropout(features, context.below("dropout"))
        logits = self.fc(dropped, context.below("fc"))
        return jnp.pad(logits, ((0, 0), (1, 0))) if self.binary else logits


def stem(config: ResNetConfig, rngs: Rngs) -> Conv | Sequential:
    """The convolutions before the first norm; ImageNet's stride, CIFAR's does not."""
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


def projection(c_in: int, c_out: int, stride: int, config: ResNetConfig, rngs: Rngs) -> Sequential:
    """Shortcut B of He et al.: a 1x1 convolution and its norm."""
    if not config.average_shortcut:
        return Sequential([Conv(c_in, c_out, 1, stride, rngs=rngs), BatchNorm(c_out)])
    pool = AveragePool() if stride == 2 else Identity()
    return Sequential([pool, Conv(c_in, c_out, 1, rngs=rngs), BatchNorm(c_out)])


def subsample(x: jax.Array, c_out: int) -> jax.Array:
    """Shortcut A of He et al.: every other pixel, and zero channels, half of them on each side."""
    x = x[:, ::2, ::2]
    extra = c_out - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


def head(c: int, config: ResNetConfig, rngs: Rngs) -> Linear | Sequential:
    """What makes logits of `c` channels: one linear layer, or numbered as in `nn.Sequential`."""
    outputs = 1 if config.binary else config.num_classes
    if config.concat_pool:
        return two_layers(c, outputs, config, rngs)
    layers: list[nnx.Module] = []
    for width in config.head_layers:
        if width == "relu":
            layers.append(Relu())
        else:
            layers.append(Linear(c, width, rngs=rngs))
            c = width
    last = Linear(c, outputs, rngs=rngs)
    return Sequential([*layers, last]) if layers else last


def two_layers(c: int, outputs: int, config: ResNetConfig, rngs: Rngs) -> Sequential:
    """fastai's `create_head` after the pooling: norm, dropout, linear, twice; He's weights."""
    hidden = 512
    return Sequential(
        [
            *(BatchNorm(2 * c), Dropout(config.dropout / 2)),
            *(Linear(2 * c, hidden, bias=False, he=True, rngs=rngs), Relu()),
            *(BatchNorm(hidden), Dropout(config.dropout)),
            Linear(hidden, outputs, bias=False, he=True, rngs=rngs),
        ]
    )
