"""Images in memory as a data source."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from jaxft.data.float_images import Planes
from jaxft.data.split_expressions import shown
from jaxft.errors import DataError

Values = Literal["uint8", "unit", "normalized"]
"""The values of images in memory: levels of 0..255, floats of 0..1, or floats as the network takes
them."""


@dataclass(frozen=True, eq=False)
class Arrays:
    """A `Source` in memory: `images` uint8 [n h w 3] or [n h w 1], `targets` int32 [n].

    Images that are normalised already are float32.
    """

    classes: tuple[str, ...]
    images: np.ndarray
    targets: np.ndarray

    @property
    def pixel_type(self) -> np.dtype[Any]:
        """uint8, or float32 for images that are normalised already."""
        return self.images.dtype

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int, /) -> tuple[Any, int]:
        """The RGB image and its target."""
        pixels = self.images[index]
        if pixels.shape[-1] == 1:
            pixels = np.repeat(pixels, 3, axis=-1)
        image = Image.fromarray(pixels) if pixels.dtype == np.uint8 else Planes.of(pixels)
        return image, int(self.targets[index])

    def identity(self, index: int, /) -> bytes:
        """Returns a digest of the image's pixels."""
        pixels = np.ascontiguousarray(self.images[index])
        return hashlib.sha256(f"{pixels.dtype}{pixels.shape}".encode() + pixels.tobytes()).digest()

    def take(self, indices: np.ndarray) -> "Arrays":
        """The source of these examples only, with the same classes."""
        return replace(self, images=self.images[indices], targets=self.targets[indices])


def arrays(
    images: np.ndarray, targets: np.ndarray, classes: Sequence[str], *, values: Values = "uint8"
) -> Arrays:
    """A source of images in memory, to pass where a spec such as `folder:PATH` goes.

    images: [n h w 3], or [n h w 1] for gray ones.
    targets: integers [n] or [n 1], indices into `classes`.
    values: of the images. `uint8`: levels of 0..255; they are kept as they are, not copied. `unit`:
      floats of 0..1, which are rounded to these levels. `normalized`: floats as the network takes
      them; a recipe's `mean` and `std` do not apply to them, scaling, crops, shifts, mirrors,
      erasing and mixing do, and augmentations of colours are refused. A shift fills in zeros.

    Raises:
      DataError: anything about them is not so; all of it is said at once.
    """
    images, targets = _array("images", images), _array("targets", targets)
    if not np.iterable(classes):
        raise DataError(f"arrays: classes are {classes!r}, but must be the names of the classes")
    classes = tuple(classes)
    if images.dtype.name == "bfloat16":  # which NumPy does not count among the floats
        images = images.astype(np.float32)
    if targets.ndim == 2 and targets.shape[1] == 1:  # a column, as of keras.datasets
        targets = targets[:, 0]
    count = len(images) if images.ndim else 0
    problems = [*_of_images(images, values), *_of_targets(targets, classes, count)]
    if not classes:
        problems.append("classes names none")
    if twice := sorted({str(name) for name in classes if classes.count(name) > 1}):
        problems.append(f"classes names some twice: {shown(twice)}")
    if images.ndim and targets.ndim and len(images) != len(targets):
        problems.append(f"there are {len(images)} images but {len(targets)} targets")
    if problems:
        raise DataError("arrays:" + "".join(f"\n  {problem}" for problem in problems))
    if values == "unit":
        images = np.rint(255 * images).astype(np.uint8)
    elif values == "normalized":
        images = np.asarray(images, np.float32)
    return Arrays(tuple(map(str, classes)), images, targets.astype(np.int32))


def _array(what: str, given: object) -> np.ndarray:
    try:
        return np.asarray(given)
    except ValueError as error:
        raise DataError(f"arrays: {what} must form one array, all of one shape: {error}") from error


def _of_images(images: np.ndarray, values: str) -> list[str]:
    found = []
    if values not in get_args(Values):
        found.append(f"values '{values}' is unknown: use {', '.join(get_args(Values))}")
    elif images.size:
        found += _of_values(images, values)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        way = "; add the channel: images[..., None]" if images.ndim == 3 else ""
        way = "; move the channels: images.transpose(0, 2, 3, 1)" if _first(images) else way
        found.append(f"images are {list(images.shape)}, but must be [n h w 3] or [n h w 1]{way}")
    elif 0 in images.shape:
        found.append(f"images are {list(images.shape)}: there are none")
    return found


def _of_values(images: np.ndarray, values: str) -> list[str]:
    number = np.issubdtype(images.dtype, np.number)
    floats = np.issubdtype(images.dtype, np.floating)
    low, high = (images.min(), images.max()) if number and images.dtype.kind != "c" else (0, 0)
    if not np.isfinite([low, high]).all():
        count = images.size - int(np.isfinite(images).sum())
        return [f"{count} values of images are NaN or infinite"]
    if values == "uint8":
        return [] if images.dtype == np.uint8 else [_not_uint8(images, low, high)]
    if not floats:
        return [f"images are {images.dtype}, but values='{values}' is for floats"]
    if values == "unit":
        within = low >= 0 and high <= 1
        outside = f"images are {low:.4g} to {high:.4g}, but values='unit' is for 0..1"
        return [] if within else [f"{outside}{_advice(images, low, high)}"]
    if low >= 0 and high > 1 and np.array_equal(images, np.rint(images)):
        return [
            f"images are whole numbers of {low:.4g} to {high:.4g}, but values='normalized' is for "
            f"what the network takes{_advice(images, low, high)}"
        ]
    return []


def _not_uint8(images: np.ndarray, low: Any, high: Any) -> str:
    return f"images are {images.dtype}, but must be uint8 (0..255){_advice(images, low, high)}"


def _advice(images: np.ndarray, low: Any, high: Any) -> str:
    if images.dtype == bool:
        return "; of False and True: 255 * images.astype(np.uint8)"
    if np.issubdtype(images.dtype, np.integer):
        levels = low >= 0 and high <= 255
        return "; they fit: images.astype(np.uint8)" if levels else f"; they are {low} to {high}"
    if not np.issubdtype(images.dtype, np.floating):
        return ""
    if low >= 0 and high <= 1:
        return "; of values in 0..1: values='unit', or np.rint(255 * images).astype(np.uint8)"
    if low >= 0 and high <= 2:
        return ""
    if low >= 0 and high <= 255:
        return "; of values in 0..255: np.rint(images).astype(np.uint8)"
    return "; of values that are normalised for the network: values='normalized'"


def _first(images: np.ndarray) -> bool:
    return images.ndim == 4 and images.shape[1] in (1, 3)


def _of_targets(targets: np.ndarray, classes: tuple[str, ...], count: int) -> list[str]:
    if targets.ndim != 1:
        return [f"targets are {list(targets.shape)}, but must be [n]{_one_a_row(targets, count)}"]
    if not np.issubdtype(targets.dtype, np.integer):
        return [_not_integers(targets, classes)]
    outside = np.flatnonzero((targets < 0) | (targets >= len(classes)))
    if not len(outside):
        return []
    named = [f"targets[{k}] = {targets[k]}" for k in outside]
    from_one = targets.min() == 1 and targets.max() == len(classes)
    return [
        f"{len(outside)} targets are outside of 0..{len(classes) - 1} (there are "
        f"{len(classes)} classes): {shown(named)}"
        + ("; they count from 1: targets - 1" if from_one else "")
    ]


def _one_a_row(targets: np.ndarray, count: int) -> str:
    """How targets of another shape become one an image, where that is plain."""
    if targets.ndim != 2 or not targets.size or targets.dtype.kind not in "biuf":
        return ""
    if len(targets) == 1 and targets.shape[1] == count:
        return "; they are one row: targets[0]"
    if len(targets) != count:
        return ""
    if np.isin(targets, (0, 1)).all():
        if (targets.sum(1) == 1).all():
            return "; of one-hot rows: targets.argmax(1)"
        return ": each image has one class, and these rows have none or several"
    return ": each image has one class; shares of several are not supported"


def _not_integers(targets: np.ndarray, classes: tuple[str, ...]) -> str:
    found = f"targets are {targets.dtype}, but must be integers: indices into classes"
    if targets.dtype == bool:
        return f"{found}; of False and True: targets.astype(int)"
    if np.issubdtype(targets.dtype, np.floating):
        if not np.isfinite(targets).all():
            count = len(targets) - int(np.isfinite(targets).sum())
            return f"{found}; {count} are NaN or infinite: leave out images without a label"
        if np.array_equal(targets, np.rint(targets)):
            return f"{found}; they are whole numbers: targets.astype(int)"
        odd = targets[targets != np.rint(targets)][0]
        return f"{found}; {odd:g} is no index"
    if len(targets) and set(map(str, targets.tolist())) <= set(map(str, classes)):
        return f"{found}; they are names: [classes.index(name) for name in targets]"
    return found
