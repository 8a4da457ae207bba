"""Layers with torch's arithmetic and initialisation; `BatchNorm` is in `batch_norm.py`.

Each layer is called as `layer(x, context)`. Activations are `[b h w c]`, kernels `[h w i o]`.
"""

import math
from functools import reduce

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.context import Context
from jaxft.models.convolution import convolve, pointwise_conv


def make_divisible(c: float, divisor: int = 8, limit: float = 0.9) -> int:
    """Rounds a number of channels to the nearest multiple of `divisor`, as timm does.

    Rounds up if rounding to the nearest would leave less than `limit` of the channels.
    """
    rounded = max(divisor, int(c + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < limit * c else rounded


class Rngs:
    """Random keys for a network's parameters, the same as from `flax.nnx.Rngs(key)`.

    Flax counts the keys in an array. When a network is traced for its shapes, that takes as long
    as all other work, so this class counts in Python.
    """

    def __init__(self, key: jax.Array) -> None:
        self._key = key
        self._count = 0

    def params(self) -> jax.Array:
        """Returns the next key."""
        key = jax.random.fold_in(self._key, self._count)
        self._count += 1
        return key


class Conv(nnx.Module):
    """Convolution, padded equally on all sides so that stride 1 keeps the size.

    The kernel is drawn as by `torch.nn.init.kaiming_normal_` with `mode="fan_out"`, or with the
    standard deviation `std`. The bias starts at zero.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        stride: int = 1,
        groups: int = 1,
        *,
        bias: bool = False,
        std: float | None = None,
        rngs: Rngs,
    ):
        std = math.sqrt(2 / (size * size * c_out)) if std is None else std
        shape = (size, size, c_in // groups, c_out)
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros(c_out, jnp.float32))
        self.stride = stride
        self.groups = groups

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c_in]` to `[b h/stride w/stride c_out]`, sizes rounded up."""
        y = convolve(x, self.kernel[...].astype(x.dtype), self.stride, self.groups)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class PatchConv(nnx.Module):
    """Convolution of patches that do not overlap: kernel `[size size c_in c_out]`, stride `size`.

    Kernel and bias start as in torch or, with `std`, normal with that deviation and zero.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int,
        *,
        bias: bool = True,
        std: float | None = None,
        rngs: Rngs,
    ):
        linear = Linear(size * size * c_in, c_out, bias=bias, std=std, rngs=rngs)
        self.kernel = nnx.Param(linear.kernel[...].reshape(size, size, c_in, c_out))
        if bias:
            self.bias = linear.bias

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c_in]` to `[b h/size w/size c_out]`, sizes rounded down."""
        kernel = self.kernel[...].astype(x.dtype)
        size, _, c_in, c_out = kernel.shape
        b, h, w = x.shape[0], x.shape[1] // size, x.shape[2] // size
        patches = x[:, : h * size, : w * size].reshape(b, h, size, w, size, c_in)
        patches = patches.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, size * size * c_in)
        y = pointwise_conv(patches, kernel.reshape(-1, c_out))
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class Linear(nnx.Module):
    """`torch.nn.Linear`; with `std`, the kernel is normal with that deviation and the bias zero."""

    def __init__(
        self, c_in: int, c_out: int, *, bias: bool = True, std: float | None = None, rngs: Rngs
    ):
        bound = 1 / math.sqrt(c_in) if std is None else 0.0
        key, shape = rngs.params(), (c_in, c_out)
        self.kernel = nnx.Param(
            std * jax.random.normal(key, shape, jnp.float32)
            if std is not None
            else jax.random.uniform(key, shape, jnp.float32, -bound, bound)
        )
        if bias:
            self.bias = nnx.Param(
                jax.random.uniform(rngs.params(), (c_out,), jnp.float32, -bound, bound)
            )

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b c_in]` to `[b c_out]`, in the wider dtype of input and parameters."""
        y = x @ self.kernel[...]
        return y + self.bias[...] if hasattr(self, "bias") else y


class BinaryLinear(Linear):
    """A linear layer with one output z, which predicts two classes with the logits (0, z)."""

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b c_in]` to `[b 2]`."""
        return jnp.pad(super().__call__(x, context), ((0, 0), (1, 0)))


def relu(x: jax.Array) -> jax.Array:
    """Computes torch's ReLU, which keeps NaN, for any shape.

    XLA on CPU turns NaN into zero where it fuses `jax.nn.relu`, a maximum, with a sum. On GPU only
    the maximum is fused with the pooling after it.
    """
    y: jax.Array = jax.lax.platform_dependent(
        x, cuda=jax.nn.relu, rocm=jax.nn.relu, default=lambda x: jnp.where(x <= 0, 0, x)
    )
    return y


def gelu(x: jax.Array) -> jax.Array:
    """Computes torch's GELU with the error function, in float32 at least, for any shape."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * 0.5 * (1 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)


class Relu(nnx.Module):
    """`torch.nn.ReLU`."""

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Applies `relu` to an array of any shape."""
        return relu(x)


class Dropout(nnx.Module):
    """`torch.nn.Dropout`; with `rows` it drops whole examples (stochastic depth).

    References: Srivastava et al. 2014; Huang et al. 2016 (arXiv:1603.09382).
    """

    def __init__(self, rate: float, *, rows: bool = False):
        self.rate = rate
        self.rows = rows

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Zeroes values with probability `rate` and scales up the others.

        Returns `x` unchanged if the context has no key.
        """
        key = context.make_rng()
        if key is None or not self.rate:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1) if self.rows else x.shape
        kept = jax.random.bernoulli(key, 1 - self.rate, shape)
        return jnp.where(kept, x / (1 - self.rate), 0).astype(x.dtype)


class MaxPool(nnx.Module):
    """`torch.nn.MaxPool2d(3, 2, 1)`: 3x3, stride 2, padded by 1 with -inf."""

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c]` to `[b h/2 w/2 c]`, sizes rounded up."""
        return jax.lax.platform_dependent(x, cpu=_max_of_slices, default=_max_of_windows)


def _max_of_windows(x: jax.Array) -> jax.Array:
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def _max_of_slices(x: jax.Array) -> jax.Array:
    """Computes `_max_of_windows` as the maximum of nine strided slices.

    On CPU the gradient of XLA's window maximum takes five times as long and seven times the memory.
    The gradient goes to the first of equal values, and NaN exceeds all values, as in torch.
    """
    _, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    slices = [x[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]
    return reduce(lambda a, b: jnp.where((b > a) | jnp.isnan(b), b, a), slices)


class AveragePool(nnx.Module):
    """`torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)`.

    At an odd edge it averages the pixels that exist.
    """

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[b h w c]` to `[b h/2 w/2 c]`, sizes rounded up."""
        # A repeated edge does not change the mean of the edge pixels.
        _, h, w, _ = x.shape
        x = jnp.pad(x, ((0, 0), (0, h % 2), (0, w % 2), (0, 0)), mode="edge")
        return (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4


class Identity(nnx.Module):
    """`torch.nn.Identity`."""

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Returns `x`."""
        return x


class Sequential(nnx.List):
    """`torch.nn.Sequential`: the name of each layer is its number."""

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Applies the layers in order."""
        for i, layer in enumerate(self):
            x = layer(x, context.child(str(i)))
        return x
