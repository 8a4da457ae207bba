"""Batch normalisation as `torch.nn.BatchNorm2d` has it, with rows that can be left out."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike

from jaxft.models.model import NormMode


class BatchNorm(nnx.Module):
    """Normalises each channel of `[b h w c]`: `scale * (x - mean) / sqrt(var + eps) + bias`.

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

    def __call__(self, x: jax.Array, mode: NormMode, mask: ArrayLike | None = None) -> jax.Array:
        """`x` `[b h w c]` normalised, in its own dtype.

        In mode `batch`, rows where `mask` `[b]` is False enter neither the statistics nor their
        count. Raises ValueError for an unknown mode, and where there is no mask and only one
        value per channel, as torch does.
        """
        # float32 statistics for half-precision inputs; float64 stays float64.
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if mode == "batch":
            mean, var = self._batch_statistics(wide, mask)
        elif mode == "running":
            mean, var = self.mean[...], self.var[...]
        else:
            raise ValueError(f"a norm's mode is 'running' or 'batch', not {mode!r}")
        y = (wide - mean) * (jax.lax.rsqrt(var + self.eps) * self.scale[...]) + self.bias[...]
        return y.astype(x.dtype)

    def _batch_statistics(
        self, x: jax.Array, mask: ArrayLike | None
    ) -> tuple[jax.Array, jax.Array]:
        """Mean and biased variance of the batch; moves the running ones towards them."""
        b, h, w, _ = x.shape
        if mask is None and b * h * w < 2:
            raise ValueError("batch statistics need more than one value per channel")
        rows = jnp.ones(b, bool) if mask is None else jnp.asarray(mask)
        where = rows[:, None, None, None]
        count = rows.sum(dtype=x.dtype) * (h * w)

        def average(values: jax.Array) -> jax.Array:
            return jnp.where(where, values, 0).sum((0, 1, 2)) / jnp.maximum(count, 1)

        mean = average(x)
        var = average(jnp.square(x - mean))
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        # A batch of padding has no statistics, and one value has no variance: learn nothing.
        rate = jnp.where(count > 1, self.momentum, 0.0).astype(x.dtype)
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            old = running[...]
            running[...] = ((1 - rate) * old + rate * new).astype(old.dtype)
        return mean, var
