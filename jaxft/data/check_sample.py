"""Chooses the images to check before a run: all, or a sample of sets larger than the cache."""

from collections.abc import Mapping
from contextlib import suppress

import numpy as np

from jaxft.data.image_cache import BYTES_PER_PIXEL
from jaxft.data.source import Checkable, Source

SAMPLE_SIZE = 1000
"""Images of each split that are checked if not all are."""

_NUM_MEASURED = 32  # images of each split whose size is measured


def images_to_check(sources: Mapping[str, Source], limit: int | None) -> dict[str, np.ndarray]:
    """Returns the indices of the images to check, by split.

    These are all images if, decoded, they take at most `limit` bytes; otherwise at most
    `SAMPLE_SIZE` of each split, evenly spread, so that each class is represented by its size.

    Args:
      sources: sources by split.
      limit: size in bytes; None: all images; 0: always a sample.
    """
    every = {name: np.arange(len(source)) for name, source in sources.items()}
    sample = {name: evenly_spread(len(source), SAMPLE_SIZE) for name, source in sources.items()}
    is_sample = sum(map(len, sample.values())) < sum(map(len, every.values()))
    if limit is None or not is_sample:
        return every
    exceeds = limit == 0 or sum(map(decoded_bytes, sources.values())) > limit
    return sample if exceeds else every


def decoded_bytes(source: Source) -> float:
    """Estimates the size of all decoded images from a few; 0 if none of these can be read."""
    sizes = []
    if isinstance(source, Checkable):
        for index in evenly_spread(len(source), _NUM_MEASURED):
            with suppress(Exception):  # a source may raise any type; the check reports the image
                image, _ = source[int(index)]
                sizes.append(BYTES_PER_PIXEL * image.width * image.height)
    return len(source) * float(np.mean(sizes)) if sizes else 0.0


def evenly_spread(length: int, count: int) -> np.ndarray:
    """Returns at most `count` increasing indices from 0 to `length` - 1, int64 [k].

    >>> evenly_spread(10, 4)
    array([0, 3, 6, 9])
    """
    return np.linspace(0, length - 1, min(length, count)).round().astype(np.int64)
