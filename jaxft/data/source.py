"""What the rest of the house sees of a data set: a `Source`, and the `Splits` of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image


class Source(Protocol):
    """Images with their classes, by index. It may be read from several threads at once."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names; a target is an index into them."""
        ...

    @property
    def targets(self) -> np.ndarray:
        """All targets, int32 [n], without decoding an image."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """The RGB image and its target."""
        ...


@runtime_checkable
class Checkable(Protocol):
    """A source whose images may turn out to be unreadable."""

    def problem(self, index: int, /) -> str | None:
        """Where the image lies and why it cannot be read, or None if it can."""
        ...


def pixel_type(source: Source) -> np.dtype[Any]:
    """Returns the type of the images' values: uint8, or that which the source's `pixel_type` names.

    Floats are normalised already: the network takes them as they are.
    """
    return np.dtype(getattr(source, "pixel_type", np.uint8))


@dataclass(frozen=True)
class Splits:
    """The two sources of a run; `train, val = splits` unpacks them.

    remarks: what a user should know of how they came about, a sentence each.
    """

    train: Source
    val: Source
    remarks: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Source]:
        return iter((self.train, self.val))


class Collection(NamedTuple):
    """Splits that a data set has by itself; `read` opens those that are named, and no others."""

    name: str
    splits: tuple[str, ...]
    read: Callable[[Sequence[str]], Mapping[str, Source]]
