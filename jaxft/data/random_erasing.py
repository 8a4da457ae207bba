"""Random erasing on the device, as torchvision's `RandomErasing(value=0)` after `Normalize`.

Batches reach the device as uint8, where no level normalises to exactly 0. Boxes are therefore
erased inside the compiled step, after normalisation.
"""

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int, PRNGKeyArray

_ATTEMPTS = 10


def erasing_boxes(
    key: PRNGKeyArray,
    count: int,
    height: int,
    width: int,
    *,
    probability: Float[ArrayLike, ""] = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> Int[jax.Array, "{count} 4"]:
    """Draws a box per image as torchvision's `RandomErasing.get_params`.

    Takes the first of ten random boxes that is lower and narrower than the image.

    Args:
      key: random key.
      count: number of images.
      height: height of the images.
      width: width of the images.
      probability: probability that an image gets a box; otherwise, and if none of the ten boxes
        fits, the box is empty.
      scale: range of the box's area as a fraction of the image, uniform.
      ratio: range of the box's height / width, log-uniform.

    Returns:
      Top, left, height and width in pixels.
    """
    keys = jax.random.split(key, 5)
    shape = (count, _ATTEMPTS)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = height * width * jax.random.uniform(keys[0], shape, minval=scale[0], maxval=scale[1])
    aspect = jnp.exp(jax.random.uniform(keys[1], shape, minval=low, maxval=high))
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = fits.argmax(axis=1)[:, None]
    h, w = (jnp.take_along_axis(side, first, axis=1)[:, 0] for side in (h, w))
    is_erased = fits.any(axis=1) & (jax.random.uniform(keys[2], (count,)) < probability)
    h, w = jnp.where(is_erased, h, 0), jnp.where(is_erased, w, 0)
    top = jax.random.randint(keys[3], (count,), 0, height - h + 1)
    left = jax.random.randint(keys[4], (count,), 0, width - w + 1)
    return jnp.stack([top, left, h, w], axis=1)


def erase(
    images: Float[jax.Array, "b h w c"], boxes: Int[jax.Array, "b 4"]
) -> Float[jax.Array, "b h w c"]:
    """Sets the pixels in each image's box of `erasing_boxes` to 0, the mean colour."""
    _, height, width, _ = images.shape
    top, left, h, w = (boxes[:, k, None] for k in range(4))
    y, x = jnp.arange(height), jnp.arange(width)
    rows, columns = (top <= y) & (y < top + h), (left <= x) & (x < left + w)
    is_erased = rows[:, :, None] & columns[:, None, :]
    return jnp.where(is_erased[..., None], 0.0, images)
