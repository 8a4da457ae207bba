"""The layers of a ResNet beside its norms, with torch's arithmetic and initialisation.

Each is called as `layer(x, context)`. Activations are `[b h w c]`, kernels `hwio`.
"""

import math
from functools import reduce

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.context import Context
from jaxft.models.convolution import convolve
from jaxft.models.rngs import Rngs


class Conv(nnx.Module):
    """A convolution without bias, padded alike on all sides so that stride 1 keeps the size."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        rngs: Rngs,
    ):
        std = math.sqrt(2 / (size * size * c_out))
        shape = (size, size, c_in // groups, c_out)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        self.stride = stride
        self.groups = groups

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`[b h w c_in]` to `[b h/stride w/stride c_out]`, sizes rounded up."""
        return convolve(x, self.kernel[...].astype(x.dtype), self.stride, self.groups)


class Linear(nnx.Module):
    """`torch.nn.Linear`, with its initialisation or with He's."""

    def __init__(self, c_in: int, c_out: int, *, bias: bool = True, he: bool = False, rngs: Rngs):
        bound = 1 / math.sqrt(c_in)
        key, shape = rngs.params(), (c_in, c_out)
        self.kernel = nnx.Param(
            math.sqrt(2 / c_in) * jax.random.normal(key, shape, jnp.float32)
            if he
            else jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        )
        if bias:
            self.bias = nnx.Param(
                jax.random.uniform(rngs.params(), (c_out,), jnp.float32, -bound, bound)
            )

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`[b c_in]` to `[b c_out]`, in the wider dtype of input and parameters."""
        y = x @ self.kernel[...]
        return y + self.bias[...] if hasattr(self, "bias") else y


def relu(x: jax.Array) -> jax.Array:
    """Computes torch's ReLU, which keeps NaN, of any shape.

    XLA on CPU makes zeros of NaN where it fuses `jax.nn.relu`, a maximum, with a sum.
    """
    return jnp.where(x <= 0, 0, x)


class Relu(nnx.Module):
    """`torch.nn.ReLU`."""

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Any shape."""
        return relu(x)


class Dropout(nnx.Module):
    """`torch.nn.Dropout`, or with `rows` whole examples at once (stochastic depth).

    Source: Srivastava et al. 2014; Huang et al. 2016 (arXiv:1603.09382).
    """

    def __init__(self, rate: float, *, rows: bool = False):
        self.rate = rate
        self.rows = rows

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Zeros with probability `rate`, the rest scaled up; unchanged without a key."""
        key = context.draw()
        if key is None or not self.rate:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1) if self.rows else x.shape
        kept = jax.random.bernoulli(key, 1 - self.rate, shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


class MaxPool(nnx.Module):
    """3x3, stride 2, padded by 1 with -inf: `torch.nn.MaxPool2d(3, 2, 1)`."""

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`[b h w c]` to `[b h/2 w/2 c]`, sizes rounded up."""
        return jax.lax.platform_dependent(x, cpu=_maxima_of_views, default=_maxima)


def _maxima(x: jax.Array) -> jax.Array:
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def _maxima_of_views(x: jax.Array) -> jax.Array:
    """The same; on CPU XLA's own gradient takes five times as long and seven times the memory.

    Among equals the first counts, and NaN counts for more than all, as in torch.
    """
    _, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    views = [x[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
    return reduce(lambda a, b: jnp.where((b > a) | jnp.isnan(b), b, a), views)


class AveragePool(nnx.Module):
    """2x2, stride 2; at an odd edge over what is there.

    `torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)`.
    """

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`[b h w c]` to `[b h/2 w/2 c]`, sizes rounded up."""
        # The edge once more is the mean of what is there.
        _, h, w, _ = x.shape
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


class Identity(nnx.Module):
    """`torch.nn.Identity`."""

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Any shape."""
        return x


class Sequential(nnx.List):
    """`torch.nn.Sequential`: the layers' paths are their numbers."""

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """One layer after another."""
        for i, layer in enumerate(self):
            x = layer(x, context.below(str(i)))
        return x
