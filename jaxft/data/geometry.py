"""Scales, crops and flips images; pixels equal torchvision's on PIL images.

Functions take and return an RGB `PIL.Image`. Random parameters are drawn by separate functions
(`random_crop_box`, `random_offset`) from the NumPy generator that is passed in. Pillow always
antialiases.
"""

import math
from typing import Literal

import numpy as np
from PIL import Image

Interpolation = Literal["nearest", "bilinear", "bicubic"]
Box = tuple[int, int, int, int]
"""Top, left, height and width in pixels, in torchvision's order."""

RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
_AREA_RANGE = (0.08, 1.0)  # fraction of the image
_ASPECT_RANGE = (3 / 4, 4 / 3)  # width / height
_MAX_ASPECT = 16  # of an image that is scaled as a whole: longer side / shorter side


def resize(
    image: Image.Image, short_side: int, interpolation: Interpolation = "bilinear"
) -> Image.Image:
    """Scales the shorter side to `short_side` (torchvision `Resize(int)`)."""
    width, height = image.size
    # torchvision truncates the longer side.
    if width <= height:
        size = short_side, int(short_side * height / width)
    else:
        size = int(short_side * width / height), short_side
    return image.resize(size, RESAMPLING[interpolation])


def squash(
    image: Image.Image, size: tuple[int, int], interpolation: Interpolation = "bilinear"
) -> Image.Image:
    """Scales to (height, width) without keeping the aspect ratio (torchvision `Resize((h, w))`)."""
    return image.resize((size[1], size[0]), RESAMPLING[interpolation])


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Crops the central `size` x `size` pixels (torchvision `CenterCrop`); pads with zeros."""
    left, top = (_center(length, size) for length in image.size)
    return image.crop((left, top, left + size, top + size))


def resize_and_center_crop(
    image: Image.Image, short_side: int, size: int, interpolation: Interpolation = "bilinear"
) -> Image.Image:
    """Scales and crops as `center_crop(resize(image, short_side), size)`.

    If the aspect ratio exceeds 16, scales only the cropped part, to save memory. Pixels may then
    differ by 1 from rounding.
    """
    if max(image.size) <= _MAX_ASPECT * min(image.size):
        return center_crop(resize(image, short_side, interpolation), size)
    # Pairs are (horizontal, vertical). `kept` is the part of the scaled image inside the crop.
    scaled = [int(short_side * length / min(image.size)) for length in image.size]
    kept = [min(size, length) for length in scaled]
    start = [_center(length, size) if length > size else 0 for length in scaled]
    scales = [length / new_length for length, new_length in zip(image.size, scaled, strict=True)]
    left, top = (first * scale for first, scale in zip(start, scales, strict=True))
    right, bottom = (
        min((first + count) * scale, length)
        for first, count, scale, length in zip(start, kept, scales, image.size, strict=True)
    )
    part = image.resize((kept[0], kept[1]), RESAMPLING[interpolation], (left, top, right, bottom))
    return center_crop(part, size)


def _center(length: int, size: int) -> int:
    # torchvision pads the odd pixel at the end; a crop rounds half to even.
    return -((size - length) // 2) if size > length else round((length - size) / 2)


def random_crop_box(height: int, width: int, rng: np.random.Generator) -> Box:
    """Draws a box as torchvision's `RandomResizedCrop.get_params`.

    The area is uniform in 8..100 % of the image, the aspect ratio log-uniform in 3/4..4/3. If ten
    boxes do not fit, returns the largest central box with an allowed aspect ratio.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*_AREA_RANGE)
        aspect = math.exp(rng.uniform(math.log(_ASPECT_RANGE[0]), math.log(_ASPECT_RANGE[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            return int(top), int(left), h, w
    if width / height < _ASPECT_RANGE[0]:
        h, w = round(width / _ASPECT_RANGE[0]), width
    elif width / height > _ASPECT_RANGE[1]:
        h, w = height, round(height * _ASPECT_RANGE[1])
    else:
        h, w = height, width
    return (height - h) // 2, (width - w) // 2, h, w


def resized_crop(
    image: Image.Image, box: Box, size: int, interpolation: Interpolation = "bilinear"
) -> Image.Image:
    """Scales a box of the image to `size` x `size` (torchvision `RandomResizedCrop`)."""
    top, left, height, width = box
    # `resize(box=...)` would blend in pixels from around the box.
    region = image.crop((left, top, left + width, top + height))
    return region.resize((size, size), RESAMPLING[interpolation])


def hflip(image: Image.Image) -> Image.Image:
    """Flips left and right (torchvision `hflip`)."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def vflip(image: Image.Image) -> Image.Image:
    """Flips top and bottom (torchvision `vflip`)."""
    return image.transpose(Image.Transpose.FLIP_TOP_BOTTOM)


def random_offset(limit: int, rng: np.random.Generator) -> tuple[int, int]:
    """Draws an offset (down, right) in pixels, each uniform in -`limit`..`limit`."""
    top, left = rng.integers(-limit, limit + 1, size=2)
    return int(top), int(left)


def shift(image: Image.Image, offset: tuple[int, int]) -> Image.Image:
    """Moves the crop window by `offset` (down, right) pixels; pads with zeros.

    With `random_offset(p, rng)`, equals torchvision's `RandomCrop` with `padding=p`, the usual
    augmentation for CIFAR.
    """
    top, left = offset
    return image.crop((left, top, left + image.width, top + image.height))
