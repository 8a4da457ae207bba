"""Several sources as one, or some examples of them."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from jaxft.data.fingerprint import identity
from jaxft.data.source import Checkable, Source, pixel_type


@dataclass(frozen=True, eq=False)
class Joined:
    """A `Source` of some examples of several, which have the same classes.

    indices: int64 [n], into the sources laid end to end.
    targets: int32 [n].
    """

    sources: tuple[Source, ...]
    indices: np.ndarray
    targets: np.ndarray

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names."""
        return self.sources[0].classes

    @property
    def pixel_type(self) -> np.dtype[Any]:
        """The type of the images' values, that of the first source."""
        return pixel_type(self.sources[0])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """The RGB image and its target."""
        source, within = self._locate(index)
        return source[within]

    def problem(self, index: int, /) -> str | None:
        """Why the image cannot be read, as its own source tells; None if that has no doubts."""
        source, within = self._locate(index)
        return source.problem(within) if isinstance(source, Checkable) else None

    def identity(self, index: int, /) -> str | bytes:
        """Returns what its own source knows of the example without decoding it."""
        return identity(*self._locate(index))

    def take(self, indices: np.ndarray) -> "Joined":
        """The source of these examples only, with the same classes."""
        return replace(self, indices=self.indices[indices], targets=self.targets[indices])

    def _locate(self, index: int) -> tuple[Any, int]:
        position = int(self.indices[index])
        for source in self.sources:
            if position < len(source):
                break
            position -= len(source)
        return source, position


def gather(sources: tuple[Source, ...], indices: np.ndarray) -> Source:
    """These examples of the sources laid end to end; of a source's own kind where one suffices.

    indices: int64 [n], each from 0 to the sources' total length.
    """
    ends = np.cumsum([len(source) for source in sources])
    used = np.unique(np.searchsorted(ends, indices, side="right"))
    if len(used) == 1:
        source: Any = sources[used[0]]
        within = indices - (ends[used[0]] - len(source))
        if np.array_equal(within, np.arange(len(source))):
            return source
        return take(source, within)
    targets = np.concatenate([source.targets for source in sources])
    return Joined(sources, indices, targets[indices])


def take(source: Any, indices: np.ndarray) -> Any:
    """These examples of a source: by its own `take` if it has one, or from the outside."""
    own = getattr(source, "take", None)
    return own(indices) if own else Joined((source,), indices, source.targets[indices])
