"""Images of floats with the methods of Pillow's, whose own images have only levels of 0..255."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image


class Planes:
    """An RGB image of float32, as three of Pillow's images: what crops, scales and mirrors it.

    `np.asarray(planes)` is float32 [h w 3]. Where a crop leaves the image, it is 0.
    """

    mode = "RGB;F"

    def __init__(self, planes: tuple[Image.Image, ...]) -> None:
        self._planes = planes
        self.info: dict[str, Any] = {}

    @classmethod
    def of(cls, pixels: np.ndarray) -> "Planes":
        """Returns the image of float32 pixels [h w 3]."""
        planes = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
        return cls(tuple(map(Image.fromarray, planes)))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self._planes[0].size

    @property
    def width(self) -> int:
        """The width in pixels."""
        return self.size[0]

    @property
    def height(self) -> int:
        """The height in pixels."""
        return self.size[1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        pixels = np.stack([np.asarray(plane) for plane in self._planes], axis=-1)
        return pixels if dtype is None else pixels.astype(dtype)

    def copy(self) -> "Planes":
        """Returns a copy."""
        return self._each(lambda plane: plane.copy())

    def resize(self, *args: Any) -> "Planes":
        """Scales, as `Image.resize`."""
        return self._each(lambda plane: plane.resize(*args))

    def crop(self, *args: Any) -> "Planes":
        """Cuts a box out, as `Image.crop`."""
        return self._each(lambda plane: plane.crop(*args))

    def transpose(self, *args: Any) -> "Planes":
        """Mirrors, as `Image.transpose`."""
        return self._each(lambda plane: plane.transpose(*args))

    def _each(self, change: Callable[[Image.Image], Image.Image]) -> "Planes":
        return Planes(tuple(map(change, self._planes)))
