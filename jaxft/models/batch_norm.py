"""Batch normalisation as `torch.nn.BatchNorm2d` has it, with rows that can be left out."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.context import Context


class BatchNorm(nnx.Module):
    """Normalises each channel, the last axis: `scale * (x - mean) / sqrt(var + eps) + bias`.

    Flax's own differs from torch's: there the running variance is the biased one. Source:
    Ioffe and Szegedy 2015 (arXiv:1502.03167); details as in `torch.nn.BatchNorm2d`.
    """

    eps = 1e-5
    momentum = 0.1  # torch's: the weight of the new batch, Flax's 0.9

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(features, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(features, jnp.float32))

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """`x` `[b ... c]` normalised as `context.mode` says, in its own dtype.

        Batch statistics leave out the rows where `context.mask` `[b]` is False. With
        `context.replicas` above 1, each of so many equal parts of the batch is normalised by its
        own statistics and the first part's move the running ones, as in torch's
        `DistributedDataParallel`. Raises ValueError for an unknown mode, for a batch that cannot
        be so divided, and where there is no mask and only one value per channel, as torch does.
        """
        mode = context.mode
        if mode not in ("running", "batch", "batch_fixed"):
            raise ValueError(f"a norm's mode is 'running', 'batch' or 'batch_fixed', not {mode!r}")
        scale, bias = self.scale[...], self.bias[...]
        if mode == "running":
            factor = jax.lax.rsqrt(self.var[...] + self.eps) * scale
            return ((_wide(x) - self.mean[...]) * factor + bias).astype(x.dtype)
        b, n = x.shape[0], context.replicas
        if b % n:
            raise ValueError(f"a batch of {b} cannot be divided among {n} replicas")
        parts = x.reshape(n, b // n, *x.shape[1:])
        if context.mask is None and math.prod(parts.shape[1:-1]) < 2:
            raise ValueError(
                f"batch statistics of {context.path} need more than one value per channel"
            )
        mask = jnp.ones(b, bool) if context.mask is None else jnp.asarray(context.mask)
        y, (mean, var, count) = _normalize(parts, mask.reshape(n, -1), scale, bias, self.eps)
        if mode == "batch":
            self._learn(mean[0], var[0], count[0])
        return y.reshape(x.shape)

    def _learn(self, mean: jax.Array, var: jax.Array, count: jax.Array) -> None:
        """Moves the running statistics towards those of `count` values."""
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        # A batch of padding has no statistics, and one value has no variance: learn nothing.
        rate = jnp.where(count > 1, self.momentum, 0.0).astype(mean.dtype)
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            old = running[...]
            running[...] = ((1 - rate) * old + rate * new).astype(old.dtype)


Statistics = tuple[jax.Array, jax.Array, jax.Array]
"""Mean, biased variance and count of each part, `[n c]`, `[n c]` and `[n 1]`."""


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _normalize(
    x: jax.Array, rows: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[jax.Array, Statistics]:
    """Each part of `x` `[n b ... c]`, by the statistics of its `rows` `[n b]`, and these.

    The gradient is written out: what `jax.grad` would keep for it besides is a third of the memory
    that a ResNet-50's step then takes, and it goes over the batch more often.
    """
    return _forward(x, rows, scale, bias, eps)[0]


def _forward(
    x: jax.Array, rows: jax.Array, scale: jax.Array, bias: jax.Array, eps: float
) -> tuple[tuple[jax.Array, Statistics], tuple[jax.Array, ...]]:
    wide = _wide(x)
    count = rows.sum(1, wide.dtype, keepdims=True) * math.prod(x.shape[2:-1])

    def average(values: jax.Array) -> jax.Array:
        # Rows are left out as sums: to mask all their values takes XLA longer than to add them up.
        return jnp.where(rows[..., None], _row_sums(values), 0).sum(1) / jnp.maximum(count, 1)

    mean = average(wide)
    centred = wide - _spread(mean, x)
    var = average(jnp.square(centred))
    factor = jax.lax.rsqrt(var + eps)
    y = centred * _spread(factor * scale, x) + bias
    return (y.astype(x.dtype), (mean, var, count)), (x, rows, scale, mean, factor, count)


def _backward(
    eps: float, saved: tuple[jax.Array, ...], gradients: tuple[jax.Array, Statistics]
) -> tuple[jax.Array | None, ...]:
    x, rows, scale, mean, factor, count = saved
    g, (of_mean, of_var, _) = gradients
    wide, centred = _wide(g), _wide(x) - _spread(mean, x)
    sums, products = _row_sums(wide), _row_sums(wide * centred)
    # All rows were normalised by the statistics; only some of them have made these.
    of_mean = of_mean - sums.sum(1) * factor * scale
    of_var = of_var - products.sum(1) * factor**3 * scale / 2
    made = rows.reshape(*rows.shape, *(1 for _ in x.shape[2:]))
    shift, slope = (_spread(of / jnp.maximum(count, 1), x) for of in (of_mean, 2 * of_var))
    of_x = wide * _spread(factor * scale, x) + made * (shift + centred * slope)
    # From the rows' sums, not their sum: XLA would go over the batch once more for it, after all
    # other layers.
    of_scale = (products * factor[:, None]).sum((0, 1))
    of_bias = sums.sum((0, 1))
    return of_x.astype(x.dtype), None, *(of.astype(scale.dtype) for of in (of_scale, of_bias))


_normalize.defvjp(_forward, _backward)


def _wide(x: jax.Array) -> jax.Array:
    """float32 for half precision; float64 stays float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _row_sums(x: jax.Array) -> jax.Array:
    """`[n b ... c]` to `[n b c]`."""
    return x.sum(tuple(range(2, x.ndim - 1)))


def _spread(of_parts: jax.Array, x: jax.Array) -> jax.Array:
    """`[n c]` beside `x` `[n b ... c]`."""
    return of_parts.reshape(x.shape[0], *(1 for _ in x.shape[1:-1]), -1)
