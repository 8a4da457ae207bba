"""Channel attention: layers that scale each channel by a weight computed from all channels' means.

Names and arithmetic as in `timm.layers`.
"""

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.context import Context
from jaxft.models.layers import Identity, Rngs, make_divisible, relu

ChannelAttention = Literal["se", "eca"]
"""Kind of the attention: `SqueezeExcite` or `EfficientChannelAttention`."""

Activation = Callable[[jax.Array], jax.Array]


class Pointwise(nnx.Module):
    """`torch.nn.Conv2d(c_in, c_out, 1)`, applied to one pixel per image.

    The kernel is drawn as in `jaxft.models.layers.Conv`, the bias as in torch or with zeros.
    """

    def __init__(self, c_in: int, c_out: int, *, zero_bias: bool = False, rngs: Rngs):
        kernel = jax.random.normal(rngs.params(), (1, 1, c_in, c_out), jnp.float32)
        self.kernel = nnx.Param(math.sqrt(2 / c_out) * kernel)
        bound = 0.0 if zero_bias else 1 / math.sqrt(c_in)
        bias = jax.random.uniform(rngs.params(), (c_out,), jnp.float32, -bound, bound)
        self.bias = nnx.Param(bias)

    def __call__(self, x: jax.Array, context: Context | None = None) -> jax.Array:
        """Maps `[b c_in]` to `[b c_out]`."""
        return x @ self.kernel[0, 0].astype(x.dtype) + self.bias[...].astype(x.dtype)


def squeeze_excite(
    x: jax.Array,
    reduce: Pointwise,
    expand: Pointwise,
    activation: Activation = relu,
    gate: Activation = jax.nn.sigmoid,
) -> jax.Array:
    """Scales the channels of `x` `[b h w c]` by a network of two layers of their means.

    Reference: Hu et al. 2018 (arXiv:1709.01507).
    """
    weights = gate(expand(activation(reduce(x.mean((1, 2))))))
    return x * weights[:, None, None]


class SqueezeExcite(nnx.Module):
    """`timm.layers.SEModule`: `squeeze_excite` with `hidden` values between the layers."""

    def __init__(self, c: int, hidden: int, *, zero_bias: bool = False, rngs: Rngs):
        self.fc1 = Pointwise(c, hidden, zero_bias=zero_bias, rngs=rngs)
        self.fc2 = Pointwise(hidden, c, zero_bias=zero_bias, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Scales the channels of `[b h w c]`."""
        return squeeze_excite(x, self.fc1, self.fc2)


class EfficientChannelAttention(nnx.Module):
    """`timm.layers.EcaModule`: a convolution over the means of neighbouring channels.

    Reference: Wang et al. 2020 (arXiv:1910.03151).
    """

    def __init__(self, c: int, *, rngs: Rngs):
        size = int((math.log2(c) + 1) / 2)
        size = max(size + 1 - size % 2, 3)
        self.conv = ChannelConv(size, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Scales the channels of `[b h w c]`."""
        return x * jax.nn.sigmoid(self.conv(x.mean((1, 2))))[:, None, None]


class ChannelConv(nnx.Module):
    """`torch.nn.Conv1d(1, 1, size, padding=size // 2, bias=False)` over the channels."""

    def __init__(self, size: int, *, rngs: Rngs):
        bound = 1 / math.sqrt(size)
        shape = (size, 1, 1)
        self.kernel = nnx.Param(
            jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[b c]` to `[b c]`."""
        size, c = self.kernel.shape[0], x.shape[1]
        padded = jnp.pad(x, ((0, 0), (size // 2, size // 2)))
        kernel = self.kernel[:, 0, 0].astype(x.dtype)
        return sum((kernel[i] * padded[:, i : i + c] for i in range(size)), jnp.zeros((), x.dtype))


def build_attention(
    kind: ChannelAttention | None, c: int, rngs: Rngs
) -> SqueezeExcite | EfficientChannelAttention | Identity:
    """Builds a residual block's attention over `c` channels, as in timm's ResNets."""
    if kind == "se":
        return SqueezeExcite(c, make_divisible(c / 16, limit=0), rngs=rngs)
    return EfficientChannelAttention(c, rngs=rngs) if kind == "eca" else Identity()
