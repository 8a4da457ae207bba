"""Float images with the methods of Pillow images, which Pillow itself limits to 8 bits."""

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image


class FloatImage:
    """A float32 RGB image with the geometric methods of `PIL.Image.Image`.

    It stores one Pillow image (mode F) per channel. `np.asarray(image)` returns float32 [h w 3].
    Crops beyond the image's edges are filled with 0.
    """

    mode = "RGB;F"

    def __init__(self, channels: tuple[Image.Image, ...]) -> None:
        self._channels = channels
        self.info: dict[str, Any] = {}

    @classmethod
    def from_array(cls, pixels: np.ndarray) -> "FloatImage":
        """Returns the image of float32 pixels [h w 3]."""
        channels = np.ascontiguousarray(np.moveaxis(pixels, -1, 0))
        return cls(tuple(map(Image.fromarray, channels)))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self._channels[0].size

    @property
    def width(self) -> int:
        """Width in pixels."""
        return self.size[0]

    @property
    def height(self) -> int:
        """Height in pixels."""
        return self.size[1]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        pixels = np.stack([np.asarray(channel) for channel in self._channels], axis=-1)
        return pixels if dtype is None else pixels.astype(dtype)

    def copy(self) -> "FloatImage":
        """Returns a copy."""
        return self._map(lambda channel: channel.copy())

    def resize(self, *args: Any) -> "FloatImage":
        """Returns a scaled image; see `Image.resize`."""
        return self._map(lambda channel: channel.resize(*args))

    def crop(self, *args: Any) -> "FloatImage":
        """Returns a box of the image; see `Image.crop`."""
        return self._map(lambda channel: channel.crop(*args))

    def transpose(self, *args: Any) -> "FloatImage":
        """Returns a flipped or rotated image; see `Image.transpose`."""
        return self._map(lambda channel: channel.transpose(*args))

    def _map(self, function: Callable[[Image.Image], Image.Image]) -> "FloatImage":
        return FloatImage(tuple(map(function, self._channels)))
