"""Image transforms, equal to torchvision's on PIL images pixel for pixel.

Each takes an RGB `PIL.Image` and returns one. Resizing in Pillow is always antialiased. Randomness
comes from the NumPy generator that is passed in, and from nowhere else.
"""

import math
from typing import Literal

import numpy as np
from PIL import Image

Interpolation = Literal["bilinear", "bicubic"]

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_SCALE = (0.08, 1.0)
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
    return image.resize(size, _RESAMPLING[interpolation])


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The central `size` x `size` pixels (torchvision `CenterCrop`); zeros where there are none."""
    left, top = (_center(length, size) for length in image.size)
    return image.crop((left, top, left + size, top + size))


def _center(length: int, size: int) -> int:
    # Padding puts the odd pixel after the image; cropping rounds halves to even.
    return -((size - length) // 2) if size > length else round((length - size) / 2)


def crop_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A random box (top, left, height, width) as `RandomResizedCrop.get_params` draws it.

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


def random_resized_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    interpolation: Interpolation = "bilinear",
) -> Image.Image:
    """A random box, scaled to `size` x `size` (torchvision `RandomResizedCrop`)."""
    top, left, height, width = crop_box(image.height, image.width, rng)
    # Cropped first: `resize(box=...)` would blend in pixels from around the box.
    box = image.crop((left, top, left + width, top + height))
    return box.resize((size, size), _RESAMPLING[interpolation])


def horizontal_flip(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirrors left and right, half of the time (torchvision `RandomHorizontalFlip`)."""
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def shift(image: Image.Image, pixels: int, rng: np.random.Generator) -> Image.Image:
    """Moves the image by up to `pixels` each way and fills with zeros.

    The same as padding by `pixels` and cropping back at random (torchvision `RandomCrop` with
    `padding`, the usual augmentation for CIFAR).
    """
    top, left = (int(offset) for offset in rng.integers(-pixels, pixels + 1, size=2))
    return image.crop((left, top, left + image.width, top + image.height))
