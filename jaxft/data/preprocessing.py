"""How an image becomes a network's input: its size, its random views, its normalisation."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxft.data import geometry
from jaxft.data.augment import View, vary, view_of
from jaxft.errors import DataError
from jaxft.stage_options import Augment


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a network expects; the defaults are torchvision's for ImageNet.

    image_size: height and width of the input, in pixels.
    resize_size: the side that images are scaled to before the central crop; None leaves them as
      they are, so they must have the input's size already.
    resize_mode: `short_side` is the one that gets `resize_size`; or `squash`, both sides do, as in
      d2l's recipes (nothing is cropped where that is `image_size`).
    interpolation: of all scaling, `bilinear` or `bicubic`.
    mean, std: of the red, green and blue channels, for values in 0..1.
    """

    image_size: int = 224
    resize_size: int | None = 256
    resize_mode: Literal["short_side", "squash"] = "short_side"
    interpolation: geometry.Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def normalize(self, images: jax.typing.ArrayLike) -> jax.Array:
        """uint8 [b h w 3] to float32, as torchvision's `ToTensor` and `Normalize`; jittable.

        Floats are taken to be normalised already, and stay as they are.
        """
        images = jnp.asarray(images)
        if jnp.issubdtype(images.dtype, jnp.floating):
            return images
        scaled = images.astype(jnp.float32) / 255
        return (scaled - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)


def eval_view(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The image as it is evaluated, [h w 3] of its type: scaled, then cropped centrally.

    Raises:
      DataError: `resize_size` is None and the image does not have the input's size.
    """
    return np.asarray(_framed(image, preprocessing))


def train_view(
    image: Image.Image,
    preprocessing: Preprocessing,
    augment: Augment | View,
    rng: np.random.Generator,
) -> np.ndarray:
    """A view of the image to train on, [h w 3] of its type, drawn from `rng`.

    Raises:
      DataError: `augment` is unknown, or as in `eval_view`.
    """
    view = view_of(augment)
    size = preprocessing.image_size
    if view.frame == "box":
        box = geometry.crop_box(image.height, image.width, rng)
        framed = geometry.resized_crop(image, box, size, preprocessing.interpolation)
    else:
        framed = _framed(image, preprocessing)
        if view.frame == "shift":
            framed = geometry.shift(framed, geometry.shift_offset(max(1, size // 8), rng))
    return np.asarray(vary(framed, view, rng))


def _framed(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    size, side = preprocessing.image_size, preprocessing.resize_size
    if side is None:
        if image.size != (size, size):
            raise DataError(
                f"an image is {image.width}x{image.height} but the network expects {size}x{size} "
                "and resize_size is None: set resize_size to scale and crop, or image_size to the "
                "images'."
            )
        return image
    if preprocessing.resize_mode == "squash":
        scaled = geometry.squash(image, (side, side), preprocessing.interpolation)
        return geometry.center_crop(scaled, size)
    return geometry.resized_center(image, side, size, preprocessing.interpolation)
