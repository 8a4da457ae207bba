"""Residual networks in Flax NNX, with torchvision's names and torch's arithmetic.

Two layouts: ImageNet's (He et al. 2015, arXiv:1512.03385, as in `torchvision.models.resnet`)
and the thinner CIFAR one of the same paper's section 4.2. Activations are `[b h w c]`, kernels
`hwio`. The compute dtype is that of the images; parameters keep theirs.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxft.models.model import NormMode, Norms
from jaxft.models.norm import BatchNorm

Mode = Callable[[str], NormMode]
"""The mode of a norm layer, by its path below the module at hand."""


@dataclass(frozen=True)
class ResNetConfig:
    """What tells one ResNet from another."""

    layout: Literal["imagenet", "cifar"]
    depths: tuple[int, ...]
    """Residual blocks in each of `layer1`, `layer2`, ..."""
    bottleneck: bool = False
    stride_in_1x1: bool = False
    """Where a down-sampling bottleneck strides: on its first 1x1 convolution (He et al., Caffe,
    Keras) or on its 3x3 (torchvision, known as v1.5). The parameters are the same."""
    num_classes: int = 1000

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each layer's 3x3 convolutions."""
        first = 64 if self.layout == "imagenet" else 16
        return tuple(first * 2**i for i in range(len(self.depths)))

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


class Conv(nnx.Module):
    """A convolution without bias, padded alike on all sides so that stride 1 keeps the size."""

    def __init__(self, c_in: int, c_out: int, size: int, stride: int = 1, *, rngs: nnx.Rngs):
        std = math.sqrt(2 / (size * size * c_out))
        shape = (size, size, c_in, c_out)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """`[b h w c_in]` to `[b h/stride w/stride c_out]`, sizes rounded up."""
        kernel, stride = self.kernel[...].astype(x.dtype), self.stride
        if kernel.shape[0] == 1:
            # The same function as a matrix product: XLA's gradients of it are up to six
            # times faster on CPU.
            return x[:, ::stride, ::stride] @ kernel[0, 0]
        # Not "SAME": with stride 2 it pads (0, 1) where torch pads (1, 1).
        side = kernel.shape[0] // 2
        return jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            ((side, side), (side, side)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class BasicBlock(nnx.Module):
    """Two 3x3 convolutions beside a shortcut."""

    expansion = 1

    def __init__(self, c_in: int, width: int, stride: int, config: ResNetConfig, rngs: nnx.Rngs):
        self.conv1 = Conv(c_in, width, 3, stride, rngs=rngs)
        self.bn1 = BatchNorm(width)
        self.conv2 = Conv(width, width, 3, rngs=rngs)
        self.bn2 = BatchNorm(width)
        if config.layout == "imagenet" and (stride != 1 or c_in != width):
            self.downsample = projection(c_in, width, stride, rngs)

    def __call__(self, x: jax.Array, mode: Mode, mask: ArrayLike | None) -> jax.Array:
        """`[b h w c_in]` to `[b h/stride w/stride width]`."""
        y = nnx.relu(self.bn1(self.conv1(x), mode("bn1"), mask))
        y = self.bn2(self.conv2(y), mode("bn2"), mask)
        if hasattr(self, "downsample"):
            x = project(self.downsample, x, mode, mask)
        elif x.shape != y.shape:
            x = subsample(x, y.shape[-1])
        return nnx.relu(y + x)


class Bottleneck(nnx.Module):
    """A 3x3 convolution between two 1x1, beside a shortcut; four times as wide outside."""

    expansion = 4

    def __init__(self, c_in: int, width: int, stride: int, config: ResNetConfig, rngs: nnx.Rngs):
        c_out = self.expansion * width
        stride1, stride2 = (stride, 1) if config.stride_in_1x1 else (1, stride)
        self.conv1 = Conv(c_in, width, 1, stride1, rngs=rngs)
        self.bn1 = BatchNorm(width)
        self.conv2 = Conv(width, width, 3, stride2, rngs=rngs)
        self.bn2 = BatchNorm(width)
        self.conv3 = Conv(width, c_out, 1, rngs=rngs)
        self.bn3 = BatchNorm(c_out)
        if stride != 1 or c_in != c_out:
            self.downsample = projection(c_in, c_out, stride, rngs)

    def __call__(self, x: jax.Array, mode: Mode, mask: ArrayLike | None) -> jax.Array:
        """`[b h w c_in]` to `[b h/stride w/stride 4*width]`."""
        y = nnx.relu(self.bn1(self.conv1(x), mode("bn1"), mask))
        y = nnx.relu(self.bn2(self.conv2(y), mode("bn2"), mask))
        y = self.bn3(self.conv3(y), mode("bn3"), mask)
        if hasattr(self, "downsample"):
            x = project(self.downsample, x, mode, mask)
        return nnx.relu(y + x)


class ResNet(nnx.Module):
    """The network; `blocks` of its call are a run of `ResNetConfig.blocks`."""

    def __init__(self, config: ResNetConfig, *, rngs: nnx.Rngs):
        block = Bottleneck if config.bottleneck else BasicBlock
        self.imagenet = config.layout == "imagenet"
        c = config.widths[0]
        self.conv1 = Conv(3, c, 7, 2, rngs=rngs) if self.imagenet else Conv(3, c, 3, rngs=rngs)
        self.bn1 = BatchNorm(c)
        for i, (depth, width) in enumerate(zip(config.depths, config.widths, strict=True)):
            layer = []
            for j in range(depth):
                stride = 2 if i > 0 and j == 0 else 1
                layer.append(block(c, width, stride, config, rngs))
                c = block.expansion * width
            setattr(self, f"layer{i + 1}", nnx.List(layer))
        self.fc = nnx.Linear(
            c,
            config.num_classes,
            kernel_init=uniform_init(1 / math.sqrt(c)),
            bias_init=uniform_init(1 / math.sqrt(c)),
            rngs=rngs,
        )

    def __call__(
        self,
        x: jax.Array,
        *,
        norms: Norms,
        mask: ArrayLike | None,
        blocks: Sequence[str],
    ) -> jax.Array:
        """The output of the last of `blocks`, given the input `x` of the first.

        Images are `[b h w 3]`; logits `[b k]` have the wider dtype of images and parameters.
        """
        mode: Mode = (lambda path: norms) if isinstance(norms, str) else norms.__getitem__
        for name in blocks:
            if name == "stem":
                x = self._stem(x, mode, mask)
            elif name == "head":
                x = self.fc(x.mean((1, 2)))
            else:
                for i, block in enumerate(getattr(self, name)):
                    x = block(x, below(mode, f"{name}.{i}"), mask)
        return x

    def _stem(self, x: jax.Array, mode: Mode, mask: ArrayLike | None) -> jax.Array:
        x = nnx.relu(self.bn1(self.conv1(x), mode("bn1"), mask))
        return max_pool(x) if self.imagenet else x


def projection(c_in: int, c_out: int, stride: int, rngs: nnx.Rngs) -> nnx.List:
    """Shortcut B of He et al.: a 1x1 convolution and its norm."""
    return nnx.List([Conv(c_in, c_out, 1, stride, rngs=rngs), BatchNorm(c_out)])


def project(downsample: nnx.List, x: jax.Array, mode: Mode, mask: ArrayLike | None) -> jax.Array:
    """Applies a `projection`."""
    conv, norm = downsample
    return norm(conv(x), mode("downsample.1"), mask)


def subsample(x: jax.Array, c_out: int) -> jax.Array:
    """Shortcut A of He et al.: every other pixel, and zero channels, half of them on each side."""
    x = x[:, ::2, ::2]
    extra = c_out - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


def max_pool(x: jax.Array) -> jax.Array:
    """3x3, stride 2, padded by 1 with -inf: `torch.nn.MaxPool2d(3, 2, 1)`."""
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def below(mode: Mode, prefix: str) -> Mode:
    """`mode` for the paths below `prefix`."""
    return lambda path: mode(f"{prefix}.{path}")


def uniform_init(bound: float) -> jax.nn.initializers.Initializer:
    """Uniform in +-`bound`, as `torch.nn.Linear` draws both weight and bias."""

    def init(
        key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None
    ) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
