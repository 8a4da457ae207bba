"""Batch normalisation as `torch.nn.BatchNorm2d` has it, with rows that can be left out."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

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
        # float32 statistics for half-precision inputs; float64 stays float64.
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if mode == "running":
            return self._normalized(wide, self.mean[...], self.var[...]).astype(x.dtype)
        b, n = x.shape[0], context.replicas
        if b % n:
            raise ValueError(f"a batch of {b} cannot be divided among {n} replicas")
        parts = wide.reshape(n, b // n, *x.shape[1:])
        mean, var, count = _statistics(parts, context.mask)
        if mode == "batch":
            self._learn(mean[0].ravel(), var[0].ravel(), count[0].ravel())
        return self._normalized(parts, mean, var).reshape(x.shape).astype(x.dtype)

    def _normalized(self, x: jax.Array, mean: jax.Array, var: jax.Array) -> jax.Array:
        return (x - mean) * (jax.lax.rsqrt(var + self.eps) * self.scale[...]) + self.bias[...]

    def _learn(self, mean: jax.Array, var: jax.Array, count: jax.Array) -> None:
        """Moves the running statistics towards those of `count` values."""
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        # A batch of padding has no statistics, and one value has no variance: learn nothing.
        rate = jnp.where(count > 1, self.momentum, 0.0).astype(mean.dtype)
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            old = running[...]
            running[...] = ((1 - rate) * old + rate * new).astype(old.dtype)


def _statistics(x: jax.Array, mask: ArrayLike | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Mean, biased variance and count of each part of `x` `[n b ... c]`, as `[n 1 ... c or 1]`."""
    size = x[0, ..., 0].size
    if mask is None and size < 2:
        raise ValueError("batch statistics need more than one value per channel")
    rows = jnp.ones(x.shape[:2], bool) if mask is None else jnp.asarray(mask).reshape(x.shape[:2])
    count = rows.sum(1, x.dtype) * (size // x.shape[1])

    def average(values: jax.Array) -> jax.Array:
        # Rows are left out as sums: to mask all their values takes XLA longer than to add them up.
        sums = values.sum(tuple(range(2, x.ndim - 1)))
        total = jnp.where(rows[..., None], sums, 0).sum(1)
        return spread(total / jnp.maximum(count, 1)[:, None])

    def spread(of_parts: jax.Array) -> jax.Array:
        return of_parts.reshape(x.shape[0], *(1 for _ in x.shape[1:-1]), -1)

    mean = average(x)
    return mean, average(jnp.square(x - mean)), spread(count)
