"""Decoded images in memory: later epochs are spared the files and the decoder."""

import threading
from typing import Any

import numpy as np
from PIL import Image

from jaxft.data.fingerprint import identity
from jaxft.data.source import Source, pixel_type

_BYTES_PER_PIXEL = 4  # Pillow pads RGB


class Cached:
    """A `Source` that keeps the images of another as they are first decoded, up to `max_bytes`.

    Pixels are the same with and without, whatever fits. Whatever came first is kept to the end:
    epochs read every image once, in orders of their own, so that exchanging images for later ones
    would keep none until it is wanted. Threads may share it; it belongs to one process.
    """

    def __init__(self, source: Source, max_bytes: int):
        self._source = source
        self._free = max_bytes
        self._images: dict[int, Image.Image] = {}
        self._lock = threading.Lock()

    @property
    def complete(self) -> bool:
        """Whether every image is kept by now."""
        return len(self._images) == len(self)

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names, the source's."""
        return self._source.classes

    @property
    def targets(self) -> np.ndarray:
        """All targets, int32 [n], the source's."""
        return self._source.targets

    @property
    def pixel_type(self) -> np.dtype[Any]:
        """The type of the images' values, the source's."""
        return pixel_type(self._source)

    def identity(self, index: int, /) -> str | bytes:
        """Returns what the source knows of the example without decoding it."""
        return identity(self._source, index)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """The RGB image and its target; views are made of it, it must not be changed."""
        kept = self._images.get(index)
        if kept is not None:
            return kept, int(self._source.targets[index])
        image, target = self._source[index]
        size = _BYTES_PER_PIXEL * image.width * image.height
        if size <= self._free:
            # A copy, without what hangs on to an image that was opened: EXIF, profiles.
            copy = image.copy()
            copy.info.clear()
            with self._lock:  # others may have kept this image, or filled the room, meanwhile
                if size <= self._free and index not in self._images:
                    self._images[index] = copy
                    self._free -= size
        return image, target
