"""Soft targets, mixup and CutMix on the device, as pure functions that work under `jax.jit`.

As in torchvision's `v2.MixUp` and `v2.CutMix`, one coefficient is drawn per batch, and each row is
mixed with the row before it; the first row is mixed with the last. Images are normalised; targets
are probabilities; `mask` is False for padding, which follows all other rows and stays unchanged.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PRNGKeyArray


class MixedBatch(NamedTuple):
    """A batch after mixing."""

    images: Float[jax.Array, "b h w c"]
    targets: Float[jax.Array, "b k"]


def soft_targets(
    target: Int[jax.Array, " b"], num_classes: int, smoothing: float = 0.0
) -> Float[jax.Array, "b {num_classes}"]:
    """Returns smoothed one-hot targets: (1 - smoothing) onehot + smoothing / k.

    The cross entropy with these targets equals torch's with `label_smoothing=smoothing`. Smoothing
    and mixing commute.

    Args:
      target: classes.
      num_classes: number of classes k.
      smoothing: label smoothing in 0..1.
    """
    onehot = jax.nn.one_hot(target, num_classes)
    return (1 - smoothing) * onehot + smoothing / num_classes


def mixup(
    key: PRNGKeyArray,
    images: Float[jax.Array, "b h w c"],
    targets: Float[jax.Array, "b k"],
    mask: Bool[jax.Array, " b"],
    *,
    alpha: float,
) -> MixedBatch:
    """Blends each row with the row before it; the coefficient is Beta(alpha, alpha) distributed.

    Reference: Zhang et al. 2017, https://arxiv.org/abs/1710.09412.
    """
    return blend(images, targets, mask, jax.random.beta(key, alpha, alpha))


def cutmix(
    key: PRNGKeyArray,
    images: Float[jax.Array, "b h w c"],
    targets: Float[jax.Array, "b k"],
    mask: Bool[jax.Array, " b"],
    *,
    alpha: float,
) -> MixedBatch:
    """Pastes a random box from the row before; 1 - its area is Beta(alpha, alpha) distributed.

    The area is a fraction of the image, before the box is clipped at the image's edges.

    Reference: Yun et al. 2019, https://arxiv.org/abs/1905.04899.
    """
    lam_key, x_key, y_key = jax.random.split(key, 3)
    _, height, width, _ = images.shape
    lam = jax.random.beta(lam_key, alpha, alpha)
    x = jax.random.randint(x_key, (), 0, width)
    y = jax.random.randint(y_key, (), 0, height)
    return paste(images, targets, mask, cut_box(lam, x, y, height, width))


def mixup_or_cutmix(
    key: PRNGKeyArray,
    images: Float[jax.Array, "b h w c"],
    targets: Float[jax.Array, "b k"],
    mask: Bool[jax.Array, " b"],
    *,
    mixup_alpha: float,
    cutmix_alpha: float,
) -> MixedBatch:
    """Applies either mixup or CutMix to the batch, each with probability 0.5.

    Reference: torchvision's reference training script.
    """
    choice_key, key = jax.random.split(key)
    return jax.lax.cond(
        jax.random.bernoulli(choice_key),
        lambda: mixup(key, images, targets, mask, alpha=mixup_alpha),
        lambda: cutmix(key, images, targets, mask, alpha=cutmix_alpha),
    )


def blend(
    images: Float[jax.Array, "b h w c"],
    targets: Float[jax.Array, "b k"],
    mask: Bool[jax.Array, " b"],
    lam: Float[ArrayLike, ""],
) -> MixedBatch:
    """Returns lam * row + (1 - lam) * previous row, for images and targets."""

    def mix(rows: jax.Array) -> jax.Array:
        weight = jnp.asarray(lam, rows.dtype)
        mixed = _previous(rows, mask) * (1 - weight) + rows * weight
        is_real = mask.reshape(-1, *[1] * (rows.ndim - 1))
        return jnp.where(is_real, mixed, rows)

    return MixedBatch(mix(images), mix(targets))


def cut_box(
    lam: Float[ArrayLike, ""],
    x: Int[ArrayLike, ""],
    y: Int[ArrayLike, ""],
    height: int,
    width: int,
) -> Int[jax.Array, "4"]:
    """Returns the box of CutMix around (x, y), with 1 - lam of the image's area.

    The box is clipped at the image's edges. As in torchvision, half sides are truncated to pixels.

    Returns:
      Left, top, right and bottom in pixels; right and bottom are exclusive.
    """
    radius = 0.5 * jnp.sqrt(1 - jnp.asarray(lam, jnp.float32))
    half_width = (radius * width).astype(jnp.int32)
    half_height = (radius * height).astype(jnp.int32)
    left, right = jnp.maximum(x - half_width, 0), jnp.minimum(x + half_width, width)
    top, bottom = jnp.maximum(y - half_height, 0), jnp.minimum(y + half_height, height)
    return jnp.stack([left, top, right, bottom]).astype(jnp.int32)


def paste(
    images: Float[jax.Array, "b h w c"],
    targets: Float[jax.Array, "b k"],
    mask: Bool[jax.Array, " b"],
    box: Int[jax.Array, "4"],
) -> MixedBatch:
    """Pastes the previous row into each row, within a `cut_box`; blends targets by the areas."""
    _, height, width, _ = images.shape
    left, top, right, bottom = box
    y, x = jnp.arange(height)[:, None], jnp.arange(width)
    in_box = (top <= y) & (y < bottom) & (left <= x) & (x < right)
    is_pasted = mask[:, None, None, None] & in_box[:, :, None]
    lam = 1 - ((right - left) * (bottom - top)) / (width * height)
    mixed_images = jnp.where(is_pasted, _previous(images, mask), images)
    return MixedBatch(mixed_images, blend(images, targets, mask, lam).targets)


def _previous(rows: jax.Array, mask: Bool[jax.Array, " b"]) -> jax.Array:
    """Returns the previous row for each row; for the first one the last row in the mask.

    Only neighbours and one row travel between devices. An index per row would collect the whole
    batch on each of them.
    """
    index = jnp.arange(len(mask)).reshape(-1, *[1] * (rows.ndim - 1))
    last = jnp.sum(rows, 0, where=index == jnp.sum(mask) - 1)
    return jnp.where(index == 0, last, jnp.roll(rows, 1, axis=0))
