"""Concatenation and subsets of sources."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from jaxft.data.fingerprint import identity
from jaxft.data.source import Checkable, Source, Target, pixel_type


@dataclass(frozen=True, eq=False)
class ConcatSource:
    """A `Source` of selected examples of several sources with the same classes.

    Attributes:
      sources: the concatenated sources.
      indices: int64 [n], positions in the concatenation.
      targets: int32 [n] or [n k], see `Source`.
    """

    sources: tuple[Source, ...]
    indices: np.ndarray
    targets: np.ndarray

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        return self.sources[0].classes

    @property
    def pixel_type(self) -> np.dtype[Any]:
        """Dtype of the images, equal in all sources."""
        return pixel_type(self.sources[0])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, Target]:
        """Returns the RGB image and its target."""
        source, source_index = self._locate(index)
        return source[source_index]

    def problem(self, index: int, /) -> str | None:
        """Returns why the image cannot be read, or None if its source reports no problem."""
        source, source_index = self._locate(index)
        return source.problem(source_index) if isinstance(source, Checkable) else None

    def identity(self, index: int, /) -> str | bytes:
        """Returns the identity of the example in its source."""
        return identity(*self._locate(index))

    def take(self, indices: np.ndarray) -> "ConcatSource":
        """Returns the source of these examples only, with the same classes."""
        return replace(self, indices=self.indices[indices], targets=self.targets[indices])

    def _locate(self, index: int) -> tuple[Any, int]:
        """Returns the source of an example, and the example's index in it."""
        position = int(self.indices[index])
        for source in self.sources:
            if position < len(source):
                break
            position -= len(source)
        return source, position


def gather(sources: tuple[Source, ...], indices: np.ndarray) -> Source:
    """Returns the source of selected examples of the concatenated sources.

    If all examples lie in one source, returns a subset of that source instead of a `ConcatSource`.

    Args:
      sources: sources with the same classes.
      indices: int64 [n], positions in the concatenation.
    """
    ends = np.cumsum([len(source) for source in sources])
    used = np.unique(np.searchsorted(ends, indices, side="right"))
    if len(used) == 1:
        source: Any = sources[used[0]]
        source_indices = indices - (ends[used[0]] - len(source))
        if np.array_equal(source_indices, np.arange(len(source))):
            return source
        return take(source, source_indices)
    targets = np.concatenate([source.targets for source in sources])
    return ConcatSource(sources, indices, targets[indices])


def take(source: Any, indices: np.ndarray) -> Any:
    """Returns the source of these examples only, by the source's `take` if it has one."""
    method = getattr(source, "take", None)
    return method(indices) if method else ConcatSource((source,), indices, source.targets[indices])
