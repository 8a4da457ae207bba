"""Random erasing on the device, as torchvision's `RandomErasing(value=0)` after `Normalize`.

Batches come to the device as uint8, where no level normalises to exactly 0: so boxes are erased
inside the step, after normalising, by functions of a key that `jax.jit` can compile.
"""

import math

import jax
import jax.numpy as jnp

_TRIES = 10


def erasing_boxes(
    key: jax.Array,
    count: int,
    height: int,
    width: int,
    *,
    probability: float = 0.5,
    scale: tuple[float, float] = (0.02, 0.33),
    ratio: tuple[float, float] = (0.3, 3.3),
) -> jax.Array:
    """A box for each of `count` images, int32 [count 4]: top, left, height and width in pixels.

    As `RandomErasing.get_params`: areas are uniform in `scale`, as shares of the image, and ratios
    of height to width log-uniform in `ratio`. Ten boxes are tried; the first that is lower and
    narrower than the image counts. Without one, and but for `probability`, the box is empty.
    """
    keys = jax.random.split(key, 5)
    tries = (count, _TRIES)
    low, high = math.log(ratio[0]), math.log(ratio[1])
    area = height * width * jax.random.uniform(keys[0], tries, minval=scale[0], maxval=scale[1])
    aspect = jnp.exp(jax.random.uniform(keys[1], tries, minval=low, maxval=high))
    h = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = fits.argmax(axis=1)[:, None]
    h, w = (jnp.take_along_axis(side, first, axis=1)[:, 0] for side in (h, w))
    erased = fits.any(axis=1) & (jax.random.uniform(keys[2], (count,)) < probability)
    h, w = jnp.where(erased, h, 0), jnp.where(erased, w, 0)
    top = jax.random.randint(keys[3], (count,), 0, height - h + 1)
    left = jax.random.randint(keys[4], (count,), 0, width - w + 1)
    return jnp.stack([top, left, h, w], axis=1)


def erase(images: jax.Array, boxes: jax.Array) -> jax.Array:
    """Images float32 [b h w c], normalised, with 0 (the mean colour) in their `boxes` int [b 4]."""
    _, height, width, _ = images.shape
    top, left, h, w = (boxes[:, k, None] for k in range(4))
    y, x = jnp.arange(height), jnp.arange(width)
    rows, columns = (top <= y) & (y < top + h), (left <= x) & (x < left + w)
    inside = rows[:, :, None] & columns[:, None, :]
    return jnp.where(inside[..., None], 0.0, images)
