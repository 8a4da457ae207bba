"""Batch normalisation with torch's formulas and a mask for padding rows."""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from jaxft.models.context import Context
from jaxft.models.model import UPDATING, Replicas
from jaxft.models.norm_modes import check_mode

Arrays = tuple[jax.Array, ...]

STATISTICS = "batch statistics"
"""Name of the statistics for policies of `jax.checkpoint`, so that rematerialisation can keep them:
to compute them again takes another pass over the batch, and communication between devices."""


class BatchNorm(nnx.Module):
    """Batch normalisation as in `torch.nn.BatchNorm2d`, over the last axis.

    Computes `scale * (x - mean) / sqrt(var + eps) + bias`. Unlike Flax's layer, which updates the
    running variance with the biased variance, this one uses the unbiased variance, as torch does.

    Reference: Ioffe and Szegedy 2015 (arXiv:1502.03167).
    """

    eps = 1e-5
    momentum = 0.1  # the weight of the new batch, as in torch; Flax calls 0.9 the momentum

    def __init__(self, features: int):
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(features, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(features, jnp.float32))

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Normalises `x` with the statistics that `context.mode` selects.

        With several `context.replicas`, the batch is split into that number of equal parts. Each
        part is normalised with its statistics, and the statistics of the first part update the
        running ones, as in torch's `DistributedDataParallel`.

        Args:
          x: `[b ... c]`.
          context: batch statistics leave out the rows where `context.mask` `[b]` is False.

        Returns:
          `[b ... c]`, in the dtype of `x`.

        Raises:
          ValueError: if the mode is unknown, if `replicas` does not divide the batch, or, without a
            mask, if there is only one value per channel.
        """
        mode = context.mode
        check_mode(mode)
        scale, bias = self.scale[...], self.bias[...]
        if mode == "running":
            factor = jax.lax.rsqrt(self.var[...] + self.eps) * scale
            return ((_at_least_float32(x) - self.mean[...]) * factor + bias).astype(x.dtype)
        b, (n, devices) = x.shape[0], _shape(context.replicas)
        if b % (n * devices):
            raise ValueError(
                f"a batch of {b} cannot be divided among {n} replicas of {devices} devices"
            )
        if context.mask is None and b // n * math.prod(x.shape[1:-1]) < 2:
            raise ValueError(
                f"batch statistics of {context.path} need more than one value per channel"
            )
        mask = jnp.ones(b, bool) if context.mask is None else jnp.asarray(context.mask)
        y, (mean, var, count) = _normalize(
            x, mask, scale, bias, self.mean[...], self.eps, context.replicas
        )
        if mode in UPDATING:
            momentum = 1.0 if mode == "batch_replace" else self.momentum
            self._update_running(mean[0], var[0], count[0], momentum)
        return y

    def _update_running(
        self, mean: jax.Array, var: jax.Array, count: jax.Array, weight: float
    ) -> None:
        """Moves the running statistics to the statistics of `count` values, by a weight."""
        unbiased = var * (count / jnp.maximum(count - 1, 1))
        # A batch of padding has no statistics, and a single value has no variance.
        momentum = jnp.where(count > 1, weight, 0.0).astype(mean.dtype)
        for running, new in ((self.mean, mean), (self.var, unbiased)):
            old = running[...]
            running[...] = ((1 - momentum) * old + momentum * new).astype(old.dtype)


_CANCELLATION = 10.0
"""Largest E[d]^2 / (var + eps) at which E[d^2] - E[d]^2 loses at most one digit."""

Statistics = tuple[jax.Array, jax.Array, jax.Array]
"""Mean `[n c]`, biased variance `[n c]` and number of values `[n 1]` of each part."""


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _normalize(
    x: jax.Array,
    mask: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    guess: jax.Array,
    eps: float,
    replicas: Replicas,
) -> tuple[jax.Array, Statistics]:
    """Normalises each part of `x` `[b ... c]` with the statistics of its rows in `mask` `[b]`.

    The gradient is written by hand and stores only the input. The residuals of `jax.grad` would
    take a third of the memory of a ResNet-50 step, and it would read the batch more often. `guess`
    `[c]` should be close to the mean, for speed; it changes the result by rounding only.
    """
    return _forward(x, mask, scale, bias, guess, eps, replicas)[0]


def _forward(
    x: jax.Array,
    mask: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    guess: jax.Array,
    eps: float,
    replicas: Replicas,
) -> tuple[tuple[jax.Array, Statistics], tuple[jax.Array, ...]]:
    def statistics(rows: Arrays, parts: Arrays) -> tuple[Arrays, Arrays]:
        x, mask = rows
        return (), _across_devices(_statistics(x, mask, parts[0][0], eps), replicas)

    def normalize(rows: Arrays, parts: Arrays) -> tuple[Arrays, Arrays]:
        (x,), (mean, factor, bias) = rows, (_broadcast(part, rows[0]) for part in parts)
        return (((_at_least_float32(x) - mean) * factor + bias).astype(x.dtype),), ()

    def repeat(values: jax.Array) -> jax.Array:
        return jnp.broadcast_to(values, (_shape(replicas)[0], *values.shape))

    _, (mean, var, count) = _by_part(statistics, replicas, (x, mask), (repeat(guess),))
    mean, var = checkpoint_name(mean, STATISTICS), checkpoint_name(var, STATISTICS)
    inverse_std = jax.lax.rsqrt(var + eps)
    (y,), _ = _by_part(normalize, replicas, (x,), (mean, inverse_std * scale, repeat(bias)))
    return (y, (mean, var, count)), (x, mask, scale, mean, inverse_std, count)


def _shape(replicas: Replicas) -> tuple[int, int]:
    """Returns the number of parts, and of devices for each."""
    return (replicas, 1) if isinstance(replicas, int) else replicas.devices.shape


def _by_part(
    function: Callable[[Arrays, Arrays], tuple[Arrays, Arrays]],
    replicas: Replicas,
    rows: Arrays,
    parts: Arrays,
) -> tuple[Arrays, Arrays]:
    """Calls `function(rows, parts) -> (rows, parts)` on a batch that is split into parts.

    On a mesh, each device calls it on its rows, as a single part (`shard_map`). With its own
    partitioning, the compiler would not fuse the statistics with the convolution before them.

    Args:
      function: receives and returns rows `[n b ...]` and values of each part `[n c]`.
      replicas: number of parts, or the devices of each.
      rows: arrays `[b ...]`.
      parts: arrays `[n c]`.

    Returns:
      Rows `[b ...]` and values of each part `[n c]`.
    """
    if isinstance(replicas, int):
        split = tuple(x.reshape(replicas, -1, *x.shape[1:]) for x in rows)
        rows, parts = function(split, parts)
        return tuple(x.reshape(-1, *x.shape[2:]) for x in rows), parts

    def local(rows: Arrays, parts: Arrays) -> tuple[Arrays, Arrays]:
        rows, parts = function(tuple(x[None] for x in rows), parts)
        return tuple(x[0] for x in rows), parts

    specs = PartitionSpec(replicas.axis_names), PartitionSpec(replicas.axis_names[0])
    mapped = jax.shard_map(local, mesh=replicas, in_specs=specs, out_specs=specs, check_vma=False)
    return mapped(rows, parts)


def _across_devices(statistics: Statistics, replicas: Replicas) -> Statistics:
    """Combines the statistics of the devices of a part, in one exchange.

    Reference: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    if isinstance(replicas, int) or _shape(replicas)[1] == 1:
        return statistics
    each = jax.lax.all_gather(jnp.concatenate(statistics, axis=1), replicas.axis_names[1])
    means, variances, counts = jnp.split(each, (each.shape[2] // 2, each.shape[2] - 1), axis=2)
    count = counts.sum(0)
    share = counts / jnp.maximum(count, 1)
    mean = (share * means).sum(0)
    return mean, (share * (variances + jnp.square(means - mean))).sum(0), count


def _statistics(x: jax.Array, mask: jax.Array, guess: jax.Array, eps: float) -> Statistics:
    """Returns the statistics of each part in the form that is fastest on the platform."""

    def two_passes(x: jax.Array, mask: jax.Array, _: jax.Array) -> Statistics:
        return _two_passes(x, mask)

    return jax.lax.platform_dependent(
        x,
        mask,
        guess,
        tpu=partial(_one_pass, eps=eps),
        cuda=_shifted_by_row,
        rocm=_shifted_by_row,
        default=two_passes,
    )


def _shifted_by_row(x: jax.Array, mask: jax.Array, guess: jax.Array) -> Statistics:
    """Returns the statistics, reading the batch once and without a condition.

    A GPU would wait for the host at a condition. With d = x - (mean of the part's first row), the
    variance is E[d^2] - E[d]^2, and E[d]^2 is at most the variance times the number of rows. If
    the first row is padding, `guess` replaces its mean.

    Reference: Chan, Golub and LeVeque 1983, "Algorithms for computing the sample variance".
    """
    count, wide = _count(x, mask), _at_least_float32(x)
    row = _row_sums(wide[:, :1])[:, 0] / math.prod(x.shape[2:-1])
    guess = jnp.where(mask[:, :1], row, guess)
    shifted = wide - _broadcast(guess, x)
    offset, square = (_mean(values, mask, count) for values in (shifted, jnp.square(shifted)))
    return offset + guess, jnp.maximum(square - jnp.square(offset), 0), count


def _one_pass(x: jax.Array, mask: jax.Array, guess: jax.Array, eps: float) -> Statistics:
    """Returns the statistics, reading the batch once; a TPU fuses this with the convolution.

    With d = x - guess, the variance is E[d^2] - E[d]^2. If one is so much smaller than E[d]^2 that
    digits cancel, the batch is read again. So is a batch with padding, the last one of an epoch,
    because masking the sums would slow each step that trains the head of a ResNet-50 by 3 %.
    """
    wide, axes = _at_least_float32(x), tuple(range(1, x.ndim - 1))
    guess = guess.astype(wide.dtype)
    shifted = wide - guess
    offset, square = (values.mean(axes) for values in (shifted, jnp.square(shifted)))
    mean, var = offset + guess, square - jnp.square(offset)
    cancels = jnp.any(jnp.square(offset) > _CANCELLATION * (var + eps))
    mean, var = jax.lax.cond(
        cancels | ~mask.all(),
        lambda: _two_passes(x, mask)[:2],
        lambda: (mean, jnp.maximum(var, 0)),
    )
    return mean, var, _count(x, mask)


def _two_passes(x: jax.Array, mask: jax.Array) -> Statistics:
    """Returns the statistics, reading the batch once for the mean and once for the variance."""
    count, wide = _count(x, mask), _at_least_float32(x)
    mean = _mean(wide, mask, count)
    return mean, _mean(jnp.square(wide - _broadcast(mean, x)), mask, count), count


def _count(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the number of values per channel in each part, `[n 1]`."""
    dtype = _at_least_float32(x).dtype
    return mask.sum(1, dtype, keepdims=True) * math.prod(x.shape[2:-1])


def _mean(values: jax.Array, mask: jax.Array, count: jax.Array) -> jax.Array:
    """Returns the mean of the rows in the mask, `[n c]`."""
    # XLA masks the sums of the rows faster than it masks all of their values.
    return jnp.where(mask[..., None], _row_sums(values), 0).sum(1) / jnp.maximum(count, 1)


def _backward(
    eps: float,
    replicas: Replicas,
    residuals: Arrays,
    cotangents: tuple[jax.Array, Statistics],
) -> tuple[jax.Array | None, ...]:
    x, mask, scale, mean, inverse_std, count = residuals
    grad_y, (grad_mean, grad_var, _) = cotangents

    def gradients(rows: Arrays, parts: Arrays) -> tuple[Arrays, Arrays]:
        x, mask, grad_y = rows
        mean, inverse_std, factor, count, grad_mean, grad_var = parts
        wide, centred = _at_least_float32(grad_y), _at_least_float32(x) - _broadcast(mean, x)
        sums, products = _row_sums(wide), _row_sums(wide * centred)
        totals = sums.sum(1), products.sum(1)
        if not isinstance(replicas, int) and _shape(replicas)[1] > 1:
            totals = jax.lax.psum(totals, replicas.axis_names[1])
        # All rows are normalised, so all contribute to the gradient of mean and variance, which
        # flows back to the rows of the mask only. The mask multiplies these coefficients and not
        # each pixel, which XLA would write to memory on TPU v4 and v5p.
        grad_mean = grad_mean - totals[0] * factor
        grad_var = grad_var - totals[1] * inverse_std**2 * factor / 2
        pixels = tuple(range(2, x.ndim - 1))
        shift, slope = (
            jnp.expand_dims((grad / jnp.maximum(count, 1))[:, None] * mask[..., None], pixels)
            for grad in (grad_mean, 2 * grad_var)
        )
        grad_x = wide * _broadcast(factor, x) + shift + centred * slope
        # Each row's sums are scaled before they are added up: for their total XLA would read the
        # batch once more, after all other layers.
        return (grad_x.astype(x.dtype), products * inverse_std[:, None], sums), ()

    parts = (mean, inverse_std, inverse_std * scale, count, grad_mean, grad_var)
    (grad_x, products, sums), _ = _by_part(gradients, replicas, (x, mask, grad_y), parts)
    grad_scale, grad_bias = (rows.sum(0).astype(scale.dtype) for rows in (products, sums))
    return grad_x, None, grad_scale, grad_bias, None


_normalize.defvjp(_forward, _backward)


def _at_least_float32(x: jax.Array) -> jax.Array:
    """Casts half precision to float32; float64 stays float64."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _row_sums(x: jax.Array) -> jax.Array:
    """Sums each row: `[n b ... c]` to `[n b c]`."""
    return x.sum(tuple(range(2, x.ndim - 1)))


def _broadcast(values: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes `values` `[n c]` so that they broadcast against `x` `[n b ... c]`."""
    return values.reshape(x.shape[0], *(1 for _ in x.shape[1:-1]), -1)
