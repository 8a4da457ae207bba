"""Soft targets, mixup and CutMix on the device: pure, jittable functions of a key and a batch.

As torchvision's `v2.MixUp` and `v2.CutMix`: one draw a batch, and each row is mixed with the row
before it. Images are float32 [b h w c], normalised; targets float32 [b k] sum to one; `mask` bool
[b] is False for padding. Padding is not mixed into anything: the row before a row is the last one
before it that is real, and the first row's is the last real one. Padded rows stay as they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Mixed(NamedTuple):
    """A batch after mixing."""

    images: jax.Array
    """float32 [b h w c]."""
    targets: jax.Array
    """float32 [b k]."""


def soft_targets(target: jax.Array, num_classes: int, smoothing: float = 0.0) -> jax.Array:
    """(1 - s) onehot + s / k, float32 [b k], of classes int [b].

    The cross entropy with these is torch's with `label_smoothing=s`; smoothing and mixing give the
    same in either order.
    """
    onehot = jax.nn.one_hot(target, num_classes)
    return (1 - smoothing) * onehot + smoothing / num_classes


def mixup(
    key: jax.Array, images: jax.Array, targets: jax.Array, mask: jax.Array, *, alpha: float
) -> Mixed:
    """Blends rows by a share from Beta(alpha, alpha). Zhang et al. 2017, arxiv 1710.09412."""
    return blend(images, targets, mask, jax.random.beta(key, alpha, alpha))


def cutmix(
    key: jax.Array, images: jax.Array, targets: jax.Array, mask: jax.Array, *, alpha: float
) -> Mixed:
    """Pastes a box whose area is a share from Beta(alpha, alpha). Yun et al. 2019, 1905.04899."""
    for_share, for_x, for_y = jax.random.split(key, 3)
    _, height, width, _ = images.shape
    share = jax.random.beta(for_share, alpha, alpha)
    x = jax.random.randint(for_x, (), 0, width)
    y = jax.random.randint(for_y, (), 0, height)
    return paste(images, targets, mask, cut_box(share, x, y, height, width))


def mixup_or_cutmix(
    key: jax.Array,
    images: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> Mixed:
    """Either, by the toss of a coin for each batch, as torchvision's reference training."""
    coin, key = jax.random.split(key)
    return jax.lax.cond(
        jax.random.bernoulli(coin),
        lambda: mixup(key, images, targets, mask, alpha=mixup_alpha),
        lambda: cutmix(key, images, targets, mask, alpha=cutmix_alpha),
    )


def blend(
    images: jax.Array, targets: jax.Array, mask: jax.Array, share: jax.typing.ArrayLike
) -> Mixed:
    """`share` of each row and the rest of the row before it, in images and in targets."""
    before = _row_before(mask)

    def mix(rows: jax.Array) -> jax.Array:
        kept = jnp.asarray(share, rows.dtype)
        mixed = rows[before] * (1 - kept) + rows * kept
        return jnp.where(_as_column(mask, rows), mixed, rows)

    return Mixed(mix(images), mix(targets))


def cut_box(
    share: jax.typing.ArrayLike,
    x: jax.typing.ArrayLike,
    y: jax.typing.ArrayLike,
    height: int,
    width: int,
) -> jax.Array:
    """The box (left, top, right, bottom), int32 [4], around (x, y) that leaves about `share`.

    It is cut off at the image's edges, so that it may leave more. Right and bottom are exclusive.
    Sides are truncated to even numbers of pixels, as in torchvision.
    """
    radius = 0.5 * jnp.sqrt(1 - jnp.asarray(share, jnp.float32))
    across, down = (radius * width).astype(jnp.int32), (radius * height).astype(jnp.int32)
    left, right = jnp.maximum(x - across, 0), jnp.minimum(x + across, width)
    top, bottom = jnp.maximum(y - down, 0), jnp.minimum(y + down, height)
    return jnp.stack([left, top, right, bottom]).astype(jnp.int32)


def paste(images: jax.Array, targets: jax.Array, mask: jax.Array, box: jax.Array) -> Mixed:
    """Each row with `box` from the row before it; targets are blended by the areas."""
    _, height, width, _ = images.shape
    left, top, right, bottom = box
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    inside = (top <= y) & (y < bottom) & (left <= x) & (x < right)
    pasted = mask[:, None, None, None] & inside[:, :, None]
    share = 1 - ((right - left) * (bottom - top)) / (width * height)
    mixed = jnp.where(pasted, images[_row_before(mask)], images)
    return Mixed(mixed, blend(images, targets, mask, share).targets)


def _row_before(mask: jax.Array) -> jax.Array:
    """For each real row the last real one before it, cyclically, int [b]; else any."""
    rows = jnp.arange(mask.shape[0])
    latest = jax.lax.cummax(jnp.where(mask, rows, -1))  # up to and with each row
    before = jnp.roll(latest, 1)
    return jnp.where(before < 0, latest[-1], before)


def _as_column(mask: jax.Array, rows: jax.Array) -> jax.Array:
    return mask.reshape(-1, *[1] * (rows.ndim - 1))
