"""Data sources of images in memory."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from PIL import Image

from jaxft.data.class_names import join_names
from jaxft.data.float_images import FloatImage
from jaxft.data.source import Target, target_at
from jaxft.errors import DataError

Values = Literal["uint8", "unit", "normalized"]
"""Range of pixel values: 0..255, floats in 0..1, or floats normalised for the network."""


@dataclass(frozen=True, eq=False)
class ArraySource:
    """A `Source` of images in memory.

    Attributes:
      classes: class names.
      images: uint8 [n h w 3] or [n h w 1], or float32 if they are already normalised.
      targets: int32 [n], or [n k] of 0 and 1 if images may have several labels.
    """

    classes: tuple[str, ...]
    images: np.ndarray
    targets: np.ndarray

    @property
    def pixel_type(self) -> np.dtype[Any]:
        """Dtype of the images: uint8, or float32 if they are already normalised."""
        return self.images.dtype

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int, /) -> tuple[Any, Target]:
        """Returns the RGB image and its target."""
        pixels = self.images[index]
        if pixels.shape[-1] == 1:
            pixels = np.repeat(pixels, 3, axis=-1)
        is_uint8 = pixels.dtype == np.uint8
        image = Image.fromarray(pixels) if is_uint8 else FloatImage.from_array(pixels)
        return image, target_at(self.targets, index)

    def identity(self, index: int, /) -> bytes:
        """Returns a digest of the image's pixels."""
        pixels = np.ascontiguousarray(self.images[index])
        return hashlib.sha256(f"{pixels.dtype}{pixels.shape}".encode() + pixels.tobytes()).digest()

    def take(self, indices: np.ndarray) -> "ArraySource":
        """Returns the source of these examples only, with the same classes."""
        return replace(self, images=self.images[indices], targets=self.targets[indices])


def arrays(
    images: np.ndarray, targets: np.ndarray, classes: Sequence[str], *, values: Values = "uint8"
) -> ArraySource:
    """Returns a source of images in memory, for use in place of a spec such as `folder:PATH`.

    Args:
      images: [n h w 3], or [n h w 1] for grey images.
      targets: integer class indices, [n] or [n 1]. If images may have several labels, integers or
        booleans [n k]: 1 for each class that an image shows and 0 for the others.
      classes: class names.
      values: range of the pixel values. `uint8`: 0..255, stored without a copy. `unit`: floats in
        0..1, rounded to 0..255. `normalized`: floats that are already normalised for the network.
        A recipe's `mean` and `std` do not apply to them, shifts pad them with zeros, and colour
        augmentations are refused.

    Raises:
      DataError: some arguments are invalid; the message lists every problem.
    """
    images, targets = _as_array("images", images), _as_array("targets", targets)
    if not np.iterable(classes):
        raise DataError(f"arrays: classes are {classes!r}, but must be the names of the classes")
    classes = tuple(classes)
    if images.dtype.name == "bfloat16":  # not a subtype of np.floating
        images = images.astype(np.float32)
    if targets.ndim == 2 and targets.shape[1] == 1:  # a column, as in keras.datasets
        targets = targets[:, 0]
    num_images = len(images) if images.ndim else 0
    problems = [*_image_problems(images, values), *_target_problems(targets, classes, num_images)]
    if not classes:
        problems.append("classes is empty")
    if duplicates := sorted({str(name) for name in classes if classes.count(name) > 1}):
        problems.append(f"classes repeats names: {join_names(duplicates)}")
    if images.ndim and targets.ndim and len(images) != len(targets):
        problems.append(f"there are {len(images)} images but {len(targets)} targets")
    if problems:
        raise DataError("arrays:" + "".join(f"\n  {problem}" for problem in problems))
    if values == "unit":
        images = np.rint(255 * images).astype(np.uint8)
    elif values == "normalized":
        images = np.asarray(images, np.float32)
    return ArraySource(tuple(map(str, classes)), images, targets.astype(np.int32))


def _as_array(argument: str, value: object) -> np.ndarray:
    try:
        return np.asarray(value)
    except ValueError as error:
        raise DataError(
            f"arrays: {argument} must form one array of equal shapes: {error}"
        ) from error


def _image_problems(images: np.ndarray, values: str) -> list[str]:
    problems = []
    if values not in get_args(Values):
        problems.append(f"values '{values}' is unknown: use {', '.join(get_args(Values))}")
    elif images.size:
        problems += _value_problems(images, values)
    shape = list(images.shape)
    if images.ndim != 4 or images.shape[-1] not in (1, 3):
        hint = ""
        if images.ndim == 3:
            hint = "; add the channel: images[..., None]"
        elif images.ndim == 4 and images.shape[1] in (1, 3):
            hint = "; move the channels: images.transpose(0, 2, 3, 1)"
        problems.append(f"images have shape {shape}, but need [n h w 3] or [n h w 1]{hint}")
    elif 0 in images.shape:
        problems.append(f"images have shape {shape}: there are none")
    return problems


def _value_problems(images: np.ndarray, values: str) -> list[str]:
    is_real = np.issubdtype(images.dtype, np.number) and images.dtype.kind != "c"
    low, high = (images.min(), images.max()) if is_real else (0, 0)
    if not np.isfinite([low, high]).all():
        count = images.size - int(np.isfinite(images).sum())
        return [f"{count} values of images are NaN or infinite"]
    if values == "uint8":
        if images.dtype == np.uint8:
            return []
        hint = _conversion_hint(images, low, high)
        return [f"images are {images.dtype}, but must be uint8 (0..255){hint}"]
    if not np.issubdtype(images.dtype, np.floating):
        return [f"images are {images.dtype}, but values='{values}' is for floats"]
    if values == "unit":
        if low >= 0 and high <= 1:
            return []
        hint = _conversion_hint(images, low, high)
        return [f"images range from {low:.4g} to {high:.4g}, but values='unit' is for 0..1{hint}"]
    if low >= 0 and high > 1 and np.array_equal(images, np.rint(images)):
        return [
            f"images are whole numbers from {low:.4g} to {high:.4g}, but values='normalized' is "
            f"for normalised floats{_conversion_hint(images, low, high)}"
        ]
    return []


def _conversion_hint(images: np.ndarray, low: Any, high: Any) -> str:
    if images.dtype == bool:
        return "; convert booleans with 255 * images.astype(np.uint8)"
    if np.issubdtype(images.dtype, np.integer):
        fits = low >= 0 and high <= 255
        return "; they fit: images.astype(np.uint8)" if fits else f"; they are {low} to {high}"
    if not np.issubdtype(images.dtype, np.floating):
        return ""
    if low >= 0 and high <= 1:
        return "; for values in 0..1 use values='unit' or np.rint(255 * images).astype(np.uint8)"
    if low >= 0 and high <= 2:
        return ""
    if low >= 0 and high <= 255:
        return "; for values in 0..255 use np.rint(images).astype(np.uint8)"
    return "; for values that are normalised for the network use values='normalized'"


def _target_problems(targets: np.ndarray, classes: tuple[str, ...], num_images: int) -> list[str]:
    if targets.ndim == 2 and targets.shape[1] == len(classes) and targets.dtype.kind in "biu":
        return _label_problems(targets)
    if targets.ndim != 1:
        hint = _target_shape_hint(targets, num_images)
        return [
            f"targets have shape {list(targets.shape)}, but need [n], or for images with several "
            f"labels [n {len(classes)}], integers 0 or 1{hint}"
        ]
    if not np.issubdtype(targets.dtype, np.integer):
        hint = _target_dtype_hint(targets, classes)
        return [f"targets are {targets.dtype}, but must be integers: indices into classes{hint}"]
    outside = np.flatnonzero((targets < 0) | (targets >= len(classes)))
    if not len(outside):
        return []
    listing = join_names([f"targets[{k}] = {targets[k]}" for k in outside])
    is_one_based = targets.min() == 1 and targets.max() == len(classes)
    return [
        f"{len(outside)} targets are outside of 0..{len(classes) - 1} (there are "
        f"{len(classes)} classes): {listing}"
        + ("; they count from 1: targets - 1" if is_one_based else "")
    ]


def _label_problems(targets: np.ndarray) -> list[str]:
    """Returns the problems of integer targets [n k]."""
    outside = np.argwhere((targets != 0) & (targets != 1))
    if not len(outside):
        return []
    listing = join_names([f"targets[{i}, {k}] = {targets[i, k]}" for i, k in outside])
    return [f"{len(outside)} targets are neither 0 nor 1: {listing}"]


def _target_shape_hint(targets: np.ndarray, num_images: int) -> str:
    """Returns how to convert targets of a wrong shape, or "" if it is unclear."""
    if targets.ndim != 2 or not targets.size or targets.dtype.kind not in "biuf":
        return ""
    if len(targets) == 1 and targets.shape[1] == num_images:
        return "; they are one row: targets[0]"
    if len(targets) != num_images:
        return ""
    if np.isin(targets, (0, 1)).all():
        if (targets.sum(1) == 1).all():
            return "; for one-hot rows use targets.argmax(1)"
        return "; for rows of labels use targets.astype(int)" if targets.dtype.kind == "f" else ""
    if targets.dtype.kind == "f":
        return "; class probabilities are not supported"
    return ""


def _target_dtype_hint(targets: np.ndarray, classes: tuple[str, ...]) -> str:
    if targets.dtype == bool:
        return "; convert booleans with targets.astype(int)"
    if np.issubdtype(targets.dtype, np.floating):
        if not np.isfinite(targets).all():
            count = len(targets) - int(np.isfinite(targets).sum())
            return f"; {count} are NaN or infinite: leave out images without a label"
        fractions = targets[targets != np.rint(targets)]
        if not len(fractions):
            return "; they are whole numbers: targets.astype(int)"
        return f"; {fractions[0]:g} is no index"
    if len(targets) and set(map(str, targets.tolist())) <= set(map(str, classes)):
        return "; they are names: [classes.index(name) for name in targets]"
    return ""
