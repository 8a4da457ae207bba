"""How an image becomes a network's input: its size, its random views, its normalisation."""

from dataclasses import dataclass
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxft.data import transforms
from jaxft.errors import DataError

Augment = Literal["none", "crop_flip", "shift"]
"""The training view. `none`: the evaluation view. `crop_flip`: a random box scaled to the input
size, mirrored half of the time. `shift`: the evaluation view moved by up to an eighth."""


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What a network expects; the defaults are torchvision's for ImageNet.

    image_size: height and width of the input, in pixels.
    resize_size: the shorter side before the central crop; None leaves images as they are, so
      they must have the input's size already.
    interpolation: of all scaling, `bilinear` or `bicubic`.
    mean, std: of the red, green and blue channels, for values in 0..1.
    """

    image_size: int = 224
    resize_size: int | None = 256
    interpolation: transforms.Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def normalize(self, images: jax.typing.ArrayLike) -> jax.Array:
        """uint8 [b h w 3] to float32, as torchvision's `ToTensor` and `Normalize`; jittable."""
        scaled = jnp.asarray(images).astype(jnp.float32) / 255
        return (scaled - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)


def eval_view(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """The image as it is evaluated, uint8 [h w 3]: resized, then cropped centrally.

    Raises:
      DataError: `resize_size` is None and the image does not have the input's size.
    """
    return np.asarray(_resized(image, preprocessing))


def train_view(
    image: Image.Image, preprocessing: Preprocessing, augment: Augment, rng: np.random.Generator
) -> np.ndarray:
    """A view of the image to train on, uint8 [h w 3], drawn from `rng`.

    Raises:
      DataError: `augment` is unknown, or as in `eval_view`.
    """
    size = preprocessing.image_size
    if augment == "crop_flip":
        view = transforms.random_resized_crop(image, size, rng, preprocessing.interpolation)
        view = transforms.horizontal_flip(view, rng)
    elif augment == "shift":
        view = transforms.shift(_resized(image, preprocessing), max(1, size // 8), rng)
    elif augment == "none":
        view = _resized(image, preprocessing)
    else:
        raise DataError(f"unknown augment '{augment}': use one of {', '.join(get_args(Augment))}.")
    return np.asarray(view)


def _resized(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    size = preprocessing.image_size
    if preprocessing.resize_size is not None:
        scaled = transforms.resize(image, preprocessing.resize_size, preprocessing.interpolation)
        return transforms.center_crop(scaled, size)
    if image.size != (size, size):
        raise DataError(
            f"an image is {image.width}x{image.height} but the network expects {size}x{size} and "
            "resize_size is None: set resize_size to scale and crop, or image_size to the images'."
        )
    return image
