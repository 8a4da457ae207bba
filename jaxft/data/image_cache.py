"""Caches decoded images in memory."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

from jaxft.data.concat import take
from jaxft.data.fingerprint import identity
from jaxft.data.source import Source, Target, pixel_type, target_at

BYTES_PER_PIXEL = 4  # Pillow pads RGB


class Cached:
    """A `Source` that caches another source's decoded images, up to `max_bytes`.

    Images are never evicted: an epoch reads every image once in random order, so that an LRU cache
    would rarely hold the next image. Threads may share a cache. Processes may not: a pickled cache
    is empty.
    """

    def __init__(self, source: Source, max_bytes: int):
        self.source = source
        self._max_bytes = self._free_bytes = max_bytes
        self._images: dict[int, Image.Image] = {}
        self._lock = threading.Lock()

    @property
    def complete(self) -> bool:
        """Whether all images are cached."""
        return len(self._images) == len(self)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the source."""
        return self.source.classes

    @property
    def targets(self) -> np.ndarray:
        """Targets of the source."""
        return self.source.targets

    @property
    def pixel_type(self) -> np.dtype[Any]:
        """Dtype of the source's images."""
        return pixel_type(self.source)

    def identity(self, index: int, /) -> str | bytes:
        """Returns the identity of the example in the source."""
        return identity(self.source, index)

    def take(self, indices: np.ndarray) -> "Cached":
        """Returns an empty cache of these examples, with their part of the memory limit."""
        return Cached(take(self.source, indices), self._max_bytes * len(indices) // len(self))

    def __reduce__(self) -> tuple[Callable[..., "Cached"], tuple[Source, int]]:
        return Cached, (self.source, self._max_bytes)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, Target]:
        """Returns the RGB image, which must not be modified, and its target."""
        cached = self._images.get(index)
        if cached is not None:
            return cached, target_at(self.source.targets, index)
        image, target = self.source[index]
        size = BYTES_PER_PIXEL * image.width * image.height
        if size <= self._free_bytes:
            # A copy does not hold the file's metadata, such as EXIF and colour profiles.
            copy = image.copy()
            copy.info.clear()
            with self._lock:
                # Another thread may have cached this image, or used the free bytes.
                if size <= self._free_bytes and index not in self._images:
                    self._images[index] = copy
                    self._free_bytes -= size
        return image, target
