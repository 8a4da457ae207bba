"""Flips, shifts and colour jitter on the device; pixels equal the host's to the last bit.

The host draws the random numbers and does what needs the whole image: decoding, crop and scaling.
The device applies the other steps of the view to each batch, in a separate program: as part of the
training step, they would change how the compiler rounds the rest of the step.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Sharding
from jaxtyping import Float32, Shaped
from PIL import Image

from jaxft.data.augment import CHANNELS, View, resolve_view
from jaxft.data.batches import Batch, Crops
from jaxft.stage_options import Augment

_LUMA = (19595, 38470, 7471)  # Pillow's weights of red, green and blue, in 1/65536


def augment_batch(batch: Batch, augment: Augment | View) -> Batch:
    """Returns a batch, or stacked batches, on the devices with augmented images.

    Args:
      batch: a batch from `train_batches`; returned unchanged unless it holds `Crops`.
      augment: the random view of its images.
    """
    crops: Any = batch.image
    if not isinstance(crops, Crops):
        return batch
    images: Any = crops.images
    program = augmentation_program(resolve_view(augment), images.ndim, images.sharding)
    return batch._replace(image=program(images, crops.steps))


@cache
def augmentation_program(view: View, ndim: int, sharding: Sharding) -> Callable[..., jax.Array]:
    """Returns the jitted function from `Crops` to augmented images.

    Args:
      view: the random view of the images.
      ndim: 4 for a batch [b h w 3], 5 for stacked batches [n b h w 3].
      sharding: sharding of the images.
    """
    function = partial(augment_image, view=view)
    for _ in range(ndim - 3):
        function = jax.vmap(function)
    return jax.jit(function, out_shardings=sharding)


def augment_image(
    image: Shaped[jax.Array, "h w 3"], encoded: Float32[jax.Array, "9"], *, view: View
) -> Shaped[jax.Array, "h w 3"]:
    """Applies the steps of `DrawnSteps.encoded` to a crop, like `augment.apply_steps`."""
    # Pixels of separate planes fill a TPU's lanes; three channels would leave most of them idle.
    planes = [image[..., channel] for channel in range(3)]
    if view.crop == "shift":
        planes = [_shift(plane, encoded[:2].astype(jnp.int32)) for plane in planes]
    if view.hflip:
        planes = [jnp.where(encoded[2], plane[:, ::-1], plane) for plane in planes]
    if view.color_jitter:
        for channel, factor in zip(encoded[3:6], encoded[6:], strict=True):
            planes = _adjust(planes, channel, factor)
    return jnp.stack(planes, axis=-1)


def _shift(plane: jax.Array, offset: jax.Array) -> jax.Array:
    """Moves the window by `offset` (down, right) pixels; pads with zeros."""
    for start in offset:  # shifts rows, transposes, shifts columns, transposes back
        index = start + jnp.arange(len(plane))
        plane = plane.at[index].get(mode="fill", fill_value=0, wrap_negative_indices=False).T
    return plane


def _adjust(planes: Sequence[jax.Array], channel: jax.Array, factor: jax.Array) -> list[jax.Array]:
    """Adjusts one property of an image, like `color.adjust`.

    Pillow blends the image with a constant or gray one, all in float32:

    - brightness: black;
    - contrast: the mean of the gray image, rounded;
    - saturation: the gray image.

    Args:
      planes: levels [h w] of the three colours.
      channel: index in `CHANNELS`.
      factor: 1 for no change.
    """
    levels = [plane.astype(jnp.float32) for plane in planes]
    # All sums are integers below 2**24, and so exact.
    weighted = sum(weight * level for weight, level in zip(_LUMA, levels, strict=True))
    gray = jnp.floor((weighted + 2**15) / 2**16)
    mean = (jnp.sum(gray.astype(jnp.int32)) + gray.size // 2) // gray.size
    is_contrast = channel == CHANNELS.index("contrast")
    is_saturation = channel == CHANNELS.index("saturation")
    base = jnp.where(is_saturation, gray, jnp.where(is_contrast, mean.astype(jnp.float32), 0))
    return [_blend(base, level, factor).astype(jnp.uint8) for level in levels]


def _blend(base: jax.Array, level: jax.Array, factor: jax.Array) -> jax.Array:
    """Returns `base + factor * (level - base)` in 0..255, rounded as by Pillow's compiler.

    XLA may fuse a product and a sum into one operation with one rounding. Both give the same result
    here: with half of the factor's 24 bits, the products are exact.
    """
    bits = jax.lax.bitcast_convert_type(factor, jnp.uint32)
    coarse = jax.lax.bitcast_convert_type(bits & np.uint32(0xFFFFF000), jnp.float32)
    difference = level - base
    products = coarse * difference, (factor - coarse) * difference
    if _pillow_fuses():
        # The first sum is exact for factors of at least 1/8.
        blended = (base + products[0]) + products[1]
    else:
        blended = base + (products[0] + products[1])
    return jnp.clip(blended, 0, 255)


@cache
def _pillow_fuses() -> bool:
    """Whether Pillow rounds a product and a sum together, as compilers do by default for ARM."""
    five, zero = (Image.new("L", (1, 1), level) for level in (5, 0))
    return Image.blend(five, zero, 0.6).getpixel((0, 0)) == 1  # 5 - 3.0000001; 2 if rounded twice
