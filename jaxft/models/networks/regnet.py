"""RegNets X and Y in Flax NNX, with timm's names (Radosavovic et al. 2020, arXiv:2003.13678).

Activations are `[b h w c]`. Parameters are drawn in float32, whatever the compute dtype.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxft.models.batch_norm import BatchNorm
from jaxft.models.channel_attention import SqueezeExcite
from jaxft.models.context import Context
from jaxft.models.layers import Conv, Dropout, Identity, Rngs, make_divisible, relu
from jaxft.models.network_config import NetworkConfig, build_head, drop_path_rates

_STEM_WIDTH = 32


@dataclass(frozen=True)
class RegNetConfig(NetworkConfig):
    """Configuration of a `RegNet`; the symbols are the paper's."""

    depth: int
    """Number of residual blocks."""
    w0: int
    """Width of the first block before quantisation."""
    wa: float
    """Growth of the width per block before quantisation."""
    wm: float
    """Quotient of the widths of successive stages."""
    group_width: int
    """Channels in each group of the 3x3 convolutions."""
    squeeze_excite: bool = False
    """Use squeeze-and-excitation after the 3x3 convolutions: a RegNetY."""
    round_up: bool = False
    """Round widths up where rounding to the nearest multiple of `group_width` would take away more
    than 10 %, as torchvision does."""

    @property
    def stages(self) -> tuple[tuple[int, int], ...]:
        """Width and number of blocks of each stage."""
        linear = np.float32(self.w0) + np.float32(self.wa) * np.arange(self.depth, dtype=np.float32)
        exponents = np.round(np.log(linear / self.w0) / math.log(self.wm))
        widths = 8 * np.round(self.w0 * self.wm**exponents / 8)
        each, depths = np.unique(widths.astype(int), return_counts=True)
        return tuple((self._rounded(int(c)), int(n)) for c, n in zip(each, depths, strict=True))

    def _rounded(self, width: int) -> int:
        """Rounds a width to a multiple of the group width, which is at most the width."""
        group = min(self.group_width, width)
        return make_divisible(width, group) if self.round_up else round(width / group) * group

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks: `stem`, `s1`, ..., `s4`, `head`."""
        return ("stem", *(f"s{i + 1}" for i in range(len(self.stages))), "head")

    @property
    def head(self) -> str:
        """Path of the classifier."""
        return "head.fc"


class ConvNorm(nnx.Module):
    """Convolution and norm layer: timm's `ConvNormAct` without its activation."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        zero_scale: bool = False,
        rngs: Rngs,
    ):
        std = math.sqrt(2 * groups / (size * size * c_out))  # timm's fan-out is a group's
        self.conv = Conv(c_in, c_out, size, stride, groups, std=std, rngs=rngs)
        self.bn = BatchNorm(c_out)
        if zero_scale:
            self.bn.scale[...] = jnp.zeros(c_out, jnp.float32)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c_in]` to `[b h/stride w/stride c_out]`."""
        return self.bn(self.conv(x, context.child("conv")), context.child("bn"))


class Block(nnx.Module):
    """Residual block of a 1x1, a grouped 3x3 and a 1x1 convolution."""

    def __init__(
        self, c_in: int, c: int, stride: int, drop_path: float, config: RegNetConfig, rngs: Rngs
    ):
        groups = c // min(config.group_width, c)
        self.conv1 = ConvNorm(c_in, c, 1, rngs=rngs)
        self.conv2 = ConvNorm(c, c, 3, stride, groups, rngs=rngs)
        hidden = round(c_in / 4)
        self.se = (
            SqueezeExcite(c, hidden, zero_bias=True, rngs=rngs)
            if config.squeeze_excite
            else Identity()
        )
        self.conv3 = ConvNorm(c, c, 1, zero_scale=True, rngs=rngs)
        is_identity = stride == 1 and c_in == c
        self.downsample = Identity() if is_identity else ConvNorm(c_in, c, 1, stride, rngs=rngs)
        self.drop_path = Dropout(drop_path, rows=True)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c_in]` to `[b h/stride w/stride c]`."""
        child = context.child
        y = relu(self.conv1(x, child("conv1")))
        y = relu(self.conv2(y, child("conv2")))
        y = self.conv3(self.se(y, child("se")), child("conv3"))
        return relu(self.drop_path(y, context) + self.downsample(x, child("downsample")))


class Stage(nnx.Module):
    """Residual blocks `b1`, `b2`, ...; the first one halves height and width."""

    def __init__(
        self, c_in: int, c: int, drop_paths: Sequence[float], config: RegNetConfig, rngs: Rngs
    ):
        self.names = tuple(f"b{i + 1}" for i in range(len(drop_paths)))
        for i, (name, rate) in enumerate(zip(self.names, drop_paths, strict=True)):
            stride, width = (1, c) if i else (2, c_in)
            setattr(self, name, Block(width, c, stride, rate, config, rngs))

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Applies the blocks in order."""
        for name in self.names:
            x = getattr(self, name)(x, context.child(name))
        return x


class Head(nnx.Module):
    """Dropout and the classifier `fc`."""

    def __init__(self, c: int, config: RegNetConfig, rngs: Rngs):
        self.dropout = Dropout(config.dropout)
        self.fc = build_head(c, config, rngs)

    def __call__(self, features: jax.Array, context: Context) -> jax.Array:
        """Maps `[b c]` to logits `[b k]`."""
        dropped = self.dropout(features, context.child("dropout"))
        return self.fc(dropped, context.child("fc"))


class RegNet(nnx.Module):
    """RegNet X or Y whose blocks can be applied separately."""

    def __init__(self, config: RegNetConfig, *, rngs: Rngs):
        self.last_stage = config.blocks[-2]
        self.stem = ConvNorm(3, _STEM_WIDTH, 3, 2, rngs=rngs)
        c = _STEM_WIDTH
        rates = iter(drop_path_rates(config, config.depth))
        for name, (width, depth) in zip(config.blocks[1:-1], config.stages, strict=True):
            setattr(self, name, Stage(c, width, [next(rates) for _ in range(depth)], config, rngs))
            c = width
        self.head = Head(c, config, rngs)

    def __call__(self, x: jax.Array, context: Context, blocks: Sequence[str]) -> jax.Array:
        """Applies consecutive `blocks` of `RegNetConfig.blocks`.

        Args:
          x: images `[b h w 3]`, or the output of the block before the first one.
          context: settings of the call.
          blocks: names of the blocks to apply.

        Returns:
          Activations `[b h w c]`, features `[b c]` after the last stage, or logits `[b k]` in the
          wider dtype of features and parameters.
        """
        for name in blocks:
            x = getattr(self, name)(x, context.child(name))
            if name == "stem":
                x = relu(x)
            elif name == self.last_stage:
                x = x.mean((1, 2))
        return x
