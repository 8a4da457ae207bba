"""Converts images to network inputs: size, random view and normalisation."""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, UInt8
from PIL import Image

from jaxft.data import geometry
from jaxft.data.augment import DrawnSteps, View, apply_steps, draw_steps, resolve_view
from jaxft.errors import DataError
from jaxft.stage_options import Augment


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Input format that a network expects. The defaults are torchvision's for ImageNet.

    Attributes:
      image_size: height and width of the input in pixels.
      resize_size: side in pixels that images are scaled to before the centre crop; with None,
        images are not scaled and must already have the input's size.
      resize_mode: `short_side` scales the shorter side to `resize_size`; `squash` scales both
        sides to it and changes the aspect ratio, as in d2l's recipes.
      interpolation: filter for scaling.
      mean: means of the red, green and blue channels, for values in 0..1.
      std: standard deviations of these channels.
    """

    image_size: int = 224
    resize_size: int | None = 256
    resize_mode: Literal["short_side", "squash"] = "short_side"
    interpolation: geometry.Interpolation = "bilinear"
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    @classmethod
    def timm(cls, image_size: int = 224, crop_pct: float = 0.875, **fields: Any) -> "Preprocessing":
        """Returns the format of a network of timm, bicubic and scaled to `image_size / crop_pct`.

        Args:
          image_size: height and width of the input in pixels.
          crop_pct: size of the centre crop relative to the scaled image.
          **fields: other fields of this class.
        """
        resize_size = math.floor(image_size / crop_pct)
        options = {"interpolation": "bicubic", **fields}
        return cls(image_size=image_size, resize_size=resize_size, **options)

    def at_size(self, image_size: int | None) -> "Preprocessing":
        """Returns the preprocessing for another size of the input; None keeps the size."""
        if image_size in (None, self.image_size):
            return self
        resize = self.resize_size and round(self.resize_size * image_size / self.image_size)
        return replace(self, image_size=image_size, resize_size=resize)

    def normalize(
        self, images: UInt8[ArrayLike, "b h w 3"] | Float[ArrayLike, "b h w 3"]
    ) -> Float[jax.Array, "b h w 3"]:
        """Normalises images like torchvision's `ToTensor` and `Normalize`; works under `jax.jit`.

        uint8 images become float32. Float images are already normalised and returned unchanged.
        """
        images = jnp.asarray(images)
        if jnp.issubdtype(images.dtype, jnp.floating):
            return images
        scaled = images.astype(jnp.float32) / 255
        return (scaled - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)


def eval_view(image: Image.Image, preprocessing: Preprocessing) -> np.ndarray:
    """Returns the evaluation view [h w 3] of an image: scaled, then cropped at the centre.

    Raises:
      DataError: `resize_size` is None and the image does not have the input's size.
    """
    return np.asarray(_resize_and_crop(image, preprocessing))


def train_view(
    image: Image.Image,
    preprocessing: Preprocessing,
    augment: Augment | View,
    rng: np.random.Generator,
) -> np.ndarray:
    """Returns a random training view [h w 3] of an image.

    Raises:
      DataError: `augment` is unknown, or as in `eval_view`.
    """
    view = resolve_view(augment)
    crop, steps = draw_view(image, preprocessing, view, rng)
    return np.asarray(apply_steps(crop, steps, view))


def draw_view(
    image: Image.Image, preprocessing: Preprocessing, view: View, rng: np.random.Generator
) -> tuple[Image.Image, DrawnSteps]:
    """Draws a random training view; returns its crop and the steps that follow it.

    Raises:
      DataError: as in `eval_view`.
    """
    size = preprocessing.image_size
    if view.crop == "random_resized":
        box = geometry.random_crop_box(image.height, image.width, rng)
        crop = geometry.resized_crop(image, box, size, preprocessing.interpolation)
    else:
        crop = _resize_and_crop(image, preprocessing)
    return crop, draw_steps(view, size, rng)


def _resize_and_crop(image: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    size, resize_size = preprocessing.image_size, preprocessing.resize_size
    if resize_size is None:
        if image.size != (size, size):
            raise DataError(
                f"an image is {image.width}x{image.height} but the network expects {size}x{size} "
                "and resize_size is None: set resize_size to scale and crop, or image_size to the "
                "size of the images."
            )
        return image
    if preprocessing.resize_mode == "squash":
        sides = (resize_size, resize_size)
        scaled = geometry.squash(image, sides, preprocessing.interpolation)
        return geometry.center_crop(scaled, size)
    return geometry.resize_and_center_crop(image, resize_size, size, preprocessing.interpolation)
