"""ConvNeXt and ConvNeXt V2 in Flax NNX, with timm's names and arithmetic.

References: Liu et al. 2022 (arXiv:2201.03545); Woo et al. 2023 (arXiv:2301.00808);
`timm.models.convnext`. Activations are `[b h w c]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.context import Context
from jaxft.models.convolution import pointwise_conv
from jaxft.models.layer_norm import LayerNorm
from jaxft.models.layers import Conv, Dropout, PatchConv, Rngs, Sequential, gelu
from jaxft.models.network_config import NetworkConfig, build_head, drop_path_rates

_STD = 0.02
"""Standard deviation of all kernels. timm truncates at 2, which is 100 deviations away."""


@dataclass(frozen=True)
class ConvNeXtConfig(NetworkConfig):
    """Configuration of a `ConvNeXt`."""

    depths: tuple[int, ...]
    """Number of residual blocks in each stage."""
    widths: tuple[int, ...]
    """Number of channels of each stage."""
    conv_mlp: bool = False
    """Whether the MLPs consist of 1x1 convolutions with kernels `[1 1 i o]`."""
    global_response_norm: bool = False
    """Use global response norm in the MLPs instead of layer scale after them (ConvNeXt V2)."""
    overlapping_stem: int | None = None
    """Channels between the two 3x3 convolutions of an overlapping stem; None: 4x4 patches."""
    norm_before_pool: bool = False
    """Normalise pixels before the global pooling instead of features after it."""

    @property
    def norm(self) -> str:
        """Path of the last norm layer, which is a block."""
        return "norm_pre" if self.norm_before_pool else "head.norm"

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks: `stem`, `stages.0`, ..., the last norm layer and `head`."""
        stages = (f"stages.{i}" for i in range(len(self.depths)))
        return ("stem", *stages, self.norm, "head")

    @property
    def head(self) -> str:
        """Path of the classifier."""
        return "head.fc"


class Pointwise(nnx.Module):
    """Linear layer over the channels, whose kernel may have the shape of a 1x1 convolution."""

    def __init__(self, c_in: int, c_out: int, *, is_conv: bool, rngs: Rngs):
        shape = (1, 1, c_in, c_out) if is_conv else (c_in, c_out)
        self.kernel = nnx.Param(_STD * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(c_out, jnp.float32))

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c_in]` to `[b h w c_out]`."""
        kernel = self.kernel[...].astype(x.dtype)
        y = pointwise_conv(x, kernel.reshape(kernel.shape[-2:]))
        return y + self.bias[...].astype(x.dtype)


class GlobalResponseNorm(nnx.Module):
    """`timm.layers.GlobalResponseNorm`: scales channels by their relative norm in an image."""

    def __init__(self, c: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.zeros(c, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(c, jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Normalises `[b h w c]`, in float32 at least; keeps the dtype."""
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        squares = jnp.square(wide).sum((1, 2), keepdims=True)
        # The gradient of a norm of 0 is 0, as in torch.
        is_zero = squares == 0
        norms = jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))
        relative = norms / (norms.mean(-1, keepdims=True) + self.eps)
        y = wide + (self.bias[...] + self.scale[...] * (wide * relative))
        return y.astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers with GELU between them, and global response norm in ConvNeXt V2."""

    def __init__(self, c: int, config: ConvNeXtConfig, rngs: Rngs):
        self.fc1 = Pointwise(c, 4 * c, is_conv=config.conv_mlp, rngs=rngs)
        if config.global_response_norm:
            self.grn = GlobalResponseNorm(4 * c)
        self.fc2 = Pointwise(4 * c, c, is_conv=config.conv_mlp, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c]` to the same shape."""
        x = gelu(self.fc1(x, context.child("fc1")))
        if hasattr(self, "grn"):
            x = self.grn(x, context.child("grn"))
        return self.fc2(x, context.child("fc2"))


class Block(nnx.Module):
    """Residual block of a depthwise 7x7 convolution, a norm layer and an MLP."""

    def __init__(self, c: int, drop_path: float, config: ConvNeXtConfig, rngs: Rngs):
        self.conv_dw = Conv(c, c, 7, groups=c, bias=True, std=_STD, rngs=rngs)
        self.norm = LayerNorm(c)
        self.mlp = Mlp(c, config, rngs)
        if not config.global_response_norm:
            self.gamma = nnx.Param(jnp.full(c, 1e-6, jnp.float32))
        self.drop_path = Dropout(drop_path, rows=True)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c]` to the same shape."""
        y = self.conv_dw(x, context.child("conv_dw"))
        y = self.mlp(self.norm(y, context.child("norm")), context.child("mlp"))
        if hasattr(self, "gamma"):
            y = y * self.gamma[...].astype(y.dtype)
        return self.drop_path(y, context) + x


class Stage(nnx.Module):
    """Residual blocks, after a norm layer and a 2x2 convolution of stride 2 if `c_in` is given."""

    def __init__(
        self,
        c_in: int | None,
        c: int,
        drop_path: Sequence[float],
        config: ConvNeXtConfig,
        rngs: Rngs,
    ):
        if c_in is not None:
            self.downsample = Sequential(
                [LayerNorm(c_in), PatchConv(c_in, c, 2, std=_STD, rngs=rngs)]
            )
        self.blocks = Sequential([Block(c, rate, config, rngs) for rate in drop_path])

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c_in]` to `[b h/2 w/2 c]`; the first stage keeps the size."""
        if hasattr(self, "downsample"):
            x = self.downsample(x, context.child("downsample"))
        return self.blocks(x, context.child("blocks"))


class Head(nnx.Module):
    """Last norm layer, unless it comes before the pooling, dropout and classifier."""

    def __init__(self, c: int, config: ConvNeXtConfig, rngs: Rngs):
        if not config.norm_before_pool:
            self.norm = LayerNorm(c)
        self.dropout = Dropout(config.dropout)
        self.fc = build_head(c, config, rngs, std=_STD)

    def __call__(self, features: jax.Array, context: Context) -> jax.Array:
        """Maps features `[b c]`, normalised, to logits `[b k]`."""
        features = self.dropout(features, context.child("dropout"))
        return self.fc(features, context.child("fc"))


class ConvNeXt(nnx.Module):
    """ConvNeXt whose blocks can be applied separately."""

    def __init__(self, config: ConvNeXtConfig, *, rngs: Rngs):
        self.last_stage = config.blocks[-3]
        self.stem = Sequential(build_stem(config, rngs))
        rates, stages, c_in = iter(drop_path_rates(config, sum(config.depths))), [], None
        for depth, c in zip(config.depths, config.widths, strict=True):
            stages.append(Stage(c_in, c, [next(rates) for _ in range(depth)], config, rngs))
            c_in = c
        self.stages = Sequential(stages)
        if config.norm_before_pool:
            self.norm_pre = LayerNorm(config.widths[-1])
        self.head = Head(config.widths[-1], config, rngs)

    def __call__(self, x: jax.Array, context: Context, blocks: Sequence[str]) -> jax.Array:
        """Applies consecutive `blocks` of `ConvNeXtConfig.blocks`.

        Args:
          x: images `[b h w 3]`, or the output of the block before the first one.
          context: settings of the call.
          blocks: names of the blocks to apply.

        Returns:
          Activations `[b h w c]`, features `[b c]` from the global pooling on, or logits `[b k]` in
          the wider dtype of features and parameters.
        """
        for name in blocks:
            child = context.child(name)
            if name == "stem":
                x = self.stem(x, child)
            elif name == "norm_pre":
                x = self.norm_pre(x, child).mean((1, 2))
            elif name == "head.norm":
                x = self.head.norm(x, child)
            elif name == "head":
                x = self.head(x, child)
            else:
                x = self.stages[int(name.removeprefix("stages."))](x, child)
                is_pooled = name == self.last_stage and not hasattr(self, "norm_pre")
                x = x.mean((1, 2)) if is_pooled else x
        return x


def build_stem(config: ConvNeXtConfig, rngs: Rngs) -> list[nnx.Module]:
    """Builds the layers before the first stage, which reduce the size to a quarter."""
    c, inner = config.widths[0], config.overlapping_stem
    if inner is None:
        return [PatchConv(3, c, 4, std=_STD, rngs=rngs), LayerNorm(c)]
    return [
        Conv(3, inner, 3, 2, bias=True, std=_STD, rngs=rngs),
        Conv(inner, c, 3, 2, bias=True, std=_STD, rngs=rngs),
        LayerNorm(c),
    ]
