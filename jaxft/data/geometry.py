"""Geometry: scaling, cropping and mirroring, equal to torchvision's on PIL images, pixel for pixel.

Each function takes an RGB `PIL.Image` and returns one. Resizing in Pillow is always antialiased.
What is random is drawn first, from the NumPy generator that is passed in and from nowhere else
(`crop_box`, `shift_offset`), and applied by a function without randomness.
"""

import math
from typing import Literal

import numpy as np
from PIL import Image

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels, torchvision's order."""

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_SCALE = (0.08, 1.0)
_LONG = 16  # sides of an image that is scaled as a whole: the longer one by the shorter
_RATIO = (3 / 4, 4 / 3)


def resize(
    image: Image.Image, short_side: int, interpolation: Interpolation = "bilinear"
) -> Image.Image:
    """Scales so that the shorter side is `short_side` (torchvision `Resize(int)`)."""
    width, height = image.size
    # The longer side is truncated, not rounded, as there.
    if width <= height:
        size = short_side, int(short_side * height / width)
    else:
        size = int(short_side * width / height), short_side
    return image.resize(size, RESAMPLING[interpolation])


def squash(
    image: Image.Image, size: tuple[int, int], interpolation: Interpolation = "bilinear"
) -> Image.Image:
    """Scales to (height, width), whatever the proportions (torchvision `Resize((h, w))`)."""
    return image.resize((size[1], size[0]), RESAMPLING[interpolation])


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central `size` x `size` pixels (torchvision `CenterCrop`); zeros where there are none."""
    left, top = (_center(length, size) for length in image.size)
    return image.crop((left, top, left + size, top + size))


def resized_center(
    image: Image.Image, short_side: int, size: int, interpolation: Interpolation = "bilinear"
) -> Image.Image:
    """Scales and crops: `center_crop(resize(image, short_side), size)`.

    Of an image that is more than 16 times as long as wide, only the part that is kept is scaled, so
    that the whole never lies in memory; its levels may differ by 1 from rounding.
    """
    if max(image.size) <= _LONG * min(image.size):
        return center_crop(resize(image, short_side, interpolation), size)
    scaled = [int(short_side * length / min(image.size)) for length in image.size]
    kept = [min(size, length) for length in scaled]
    first = [_center(length, size) if length > size else 0 for length in scaled]
    units = [length / steps for length, steps in zip(image.size, scaled, strict=True)]
    left, top = (start * unit for start, unit in zip(first, units, strict=True))
    right, bottom = (
        min((start + count) * unit, length)
        for start, count, unit, length in zip(first, kept, units, image.size, strict=True)
    )
    part = image.resize((kept[0], kept[1]), RESAMPLING[interpolation], (left, top, right, bottom))
    return center_crop(part, size)


def _center(length: int, size: int) -> int:
    # Padding puts the odd pixel after the image; cropping rounds halves to even.
    return -((size - length) // 2) if size > length else round((length - size) / 2)


def crop_box(height: int, width: int, rng: np.random.Generator) -> Box:
    """A random box as `RandomResizedCrop.get_params` draws it.

    The area is uniform in 8..100 % of the image's and the aspect ratio log-uniform in 3/4..4/3.
    After ten boxes that do not fit, the largest central box with an allowed ratio is taken.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*_SCALE)
        ratio = math.exp(rng.uniform(math.log(_RATIO[0]), math.log(_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(top), int(left), h, w
    if width / height < _RATIO[0]:
        h, w = round(width / _RATIO[0]), width
    elif width / height > _RATIO[1]:
        h, w = height, round(height * _RATIO[1])
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(
    image: Image.Image, box: Box, size: int, interpolation: Interpolation = "bilinear"
) -> Image.Image:
    """A box of the image, scaled to `size` x `size` (torchvision `RandomResizedCrop`)."""
    top, left, height, width = box
    # Cropped first: `resize(box=...)` would blend in pixels from around the box.
    region = image.crop((left, top, left + width, top + height))
    return region.resize((size, size), RESAMPLING[interpolation])


def mirror(image: Image.Image) -> Image.Image:
    """Left becomes right (torchvision `hflip`)."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def upend(image: Image.Image) -> Image.Image:
    """Top becomes bottom (torchvision `vflip`)."""
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


def shift_offset(pixels: int, rng: np.random.Generator) -> tuple[int, int]:
    """Where to (down, right), each uniform in -`pixels`..`pixels`."""
    top, left = rng.integers(-pixels, pixels + 1, size=2)
    return int(top), int(left)


def shift(image: Image.Image, offset: tuple[int, int]) -> Image.Image:
    """The image's frame moved (down, right) by `offset` pixels, zeros where it leaves the image.

    With `shift_offset(p, rng)` the same as padding by `p` and cropping back at random (torchvision
    `RandomCrop` with `padding`, the usual augmentation for CIFAR).
    """
    top, left = offset
    return image.crop((left, top, left + image.width, top + image.height))
