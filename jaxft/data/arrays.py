"""Images in memory as a data source."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from jaxft.data.splits import shown
from jaxft.errors import DataError


@dataclass(frozen=True, eq=False)
class Arrays:
    """A `Source` in memory: `images` uint8 [n h w 3] or [n h w 1], `targets` int32 [n]."""

    classes: tuple[str, ...]
    images: np.ndarray
    targets: np.ndarray

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int, /) -> tuple[Image.Image, int]:
        """The RGB image and its target."""
        pixels = self.images[index]
        if pixels.shape[-1] == 1:
            pixels = np.repeat(pixels, 3, axis=-1)
        return Image.fromarray(pixels), int(self.targets[index])

    def identity(self, index: int, /) -> bytes:
        """Returns a digest of the image's pixels."""
        pixels = np.ascontiguousarray(self.images[index])
        return hashlib.sha256(f"{pixels.dtype}{pixels.shape}".encode() + pixels.tobytes()).digest()

    def take(self, indices: np.ndarray) -> "Arrays":
        """The source of these examples only, with the same classes."""
        return replace(self, images=self.images[indices], targets=self.targets[indices])


def arrays(images: np.ndarray, targets: np.ndarray, classes: Sequence[str]) -> Arrays:
    """A source of images in memory, to pass where a spec such as `folder:PATH` goes.

    images: uint8 [n h w 3], or [n h w 1] for gray ones; kept as it is, not copied.
    targets: integers [n], indices into `classes`.

    Raises:
      DataError: anything about them is not so; all of it is said at once.
    """
    images, targets, classes = np.asarray(images), np.asarray(targets), tuple(classes)
    problems = [*_of_images(images), *_of_targets(targets, classes)]
    if not classes:
        problems.append("classes names none")
    if twice := sorted({str(name) for name in classes if classes.count(name) > 1}):
        problems.append(f"classes names some twice: {shown(twice)}")
    if images.ndim and targets.ndim and len(images) != len(targets):
        problems.append(f"there are {len(images)} images but {len(targets)} targets")
    if problems:
        raise DataError("arrays:" + "".join(f"\n  {problem}" for problem in problems))
    return Arrays(tuple(map(str, classes)), images, targets.astype(np.int32))


def _of_images(images: np.ndarray) -> list[str]:
    found = []
    if images.dtype != np.uint8:
        floats = np.issubdtype(images.dtype, np.floating)
        way = "; of values in 0..1: np.rint(255 * images).astype(np.uint8)" if floats else ""
        found.append(f"images are {images.dtype}, but must be uint8 (0..255){way}")
        if floats and np.isnan(images).any():
            found.append(f"{int(np.isnan(images).sum())} values of images are NaN")
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        way = "; add the channel: images[..., None]" if images.ndim == 3 else ""
        way = "; move the channels: images.transpose(0, 2, 3, 1)" if _first(images) else way
        found.append(f"images are {list(images.shape)}, but must be [n h w 3] or [n h w 1]{way}")
    elif 0 in images.shape:
        found.append(f"images are {list(images.shape)}: there are none")
    return found


def _first(images: np.ndarray) -> bool:
    return images.ndim == 4 and images.shape[1] in (1, 3)


def _of_targets(targets: np.ndarray, classes: tuple[str, ...]) -> list[str]:
    if targets.ndim != 1:
        way = "; of one-hot rows: targets.argmax(1)" if targets.ndim == 2 else ""
        return [f"targets are {list(targets.shape)}, but must be [n]{way}"]
    if not np.issubdtype(targets.dtype, np.integer):
        return [f"targets are {targets.dtype}, but must be integers: indices into classes"]
    outside = np.flatnonzero((targets < 0) | (targets >= len(classes)))
    if not len(outside):
        return []
    named = [f"targets[{k}] = {targets[k]}" for k in outside]
    return [
        f"{len(outside)} targets are outside of 0..{len(classes) - 1} (there are "
        f"{len(classes)} classes): {shown(named)}"
    ]
