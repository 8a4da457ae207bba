"""The `Source` protocol of labelled images, and the train and validation `Splits` of a run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from PIL import Image

Target = int | np.ndarray
"""Class of an image; or 0 or 1 for each class, int32 [k]."""


@runtime_checkable
class Source(Protocol):
    """Labelled images, read by index. Several threads may read at once.

    A source may also define:

    - `pixel_type`: dtype of the images; uint8 if absent.
    - `problem(index)`: see `Checkable`.
    - `identity(index)`: str or bytes that identify an example; see `jaxft.data.fingerprint`.
    - `take(indices)`: returns the source of these examples only.
    - `remarks`: sentences for the user.
    """

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""
        ...

    @property
    def targets(self) -> np.ndarray:
        """Targets of all examples, available without decoding images.

        int32 [n], indices into `classes`. If images may have several labels, [n k], 1 for each
        class that an image shows and 0 for the others.
        """
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Image.Image, Target]:
        """Returns the RGB image and its target."""
        ...


@runtime_checkable
class Checkable(Protocol):
    """A source that can check whether its images are readable."""

    def problem(self, index: int, /) -> str | None:
        """Returns the image's location and why it cannot be read, or None if it can."""
        ...


def pixel_type(source: Source) -> np.dtype[Any]:
    """Returns the dtype of the source's images.

    uint8 unless the source defines `pixel_type`. Float images are already normalised.
    """
    return np.dtype(getattr(source, "pixel_type", np.uint8))


def is_multi_label(source: object) -> bool:
    """Returns whether images of the source may have several labels: its targets are [n k]."""
    return np.ndim(getattr(source, "targets", ())) == 2


def images_per_class(source: Source) -> np.ndarray:
    """Returns the number of images of each class, int64 [k]."""
    if is_multi_label(source):
        return np.asarray(source.targets.sum(axis=0, dtype=np.int64))
    return np.bincount(source.targets, minlength=len(source.classes))


def emptied_classes(before: Source, after: Source) -> np.ndarray:
    """Returns the classes that have images in `before` and none in `after`, int64 [c]."""
    return np.flatnonzero((images_per_class(before) > 0) & (images_per_class(after) == 0))


def target_at(targets: np.ndarray, index: int) -> Target:
    """Returns the target of one example."""
    return targets[index] if targets.ndim == 2 else int(targets[index])


@dataclass(frozen=True)
class Splits:
    """Train and validation sources of a run; `train, val = splits` unpacks them.

    Attributes:
      train: images to train on.
      val: images to validate on.
      remarks: sentences for the user about how the splits were chosen.
    """

    train: Source
    val: Source
    remarks: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Source]:
        return iter((self.train, self.val))


class Collection(NamedTuple):
    """All splits of a data set, from which a run selects.

    Attributes:
      name: name of the data set in messages.
      splits: names of the splits.
      read: opens the named splits only.
    """

    name: str
    splits: tuple[str, ...]
    read: Callable[[Sequence[str]], Mapping[str, Source]]
