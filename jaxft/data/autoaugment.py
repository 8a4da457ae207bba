"""RandAugment and TrivialAugment, equal to torchvision's on PIL images.

A policy draws names and magnitudes of operations; `apply` carries one out. Source: torchvision
`RandAugment` and `TrivialAugmentWide`, whose names, ranges and float32 magnitudes these are.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from jaxft.data.color import adjust
from jaxft.data.geometry import RESAMPLING, Interpolation
from jaxft.errors import DataError

Step = tuple[str, float]
"""An operation of `apply` and its magnitude; 0 for those without one."""

_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_ENHANCING = ("Brightness", "Color", "Contrast", "Sharpness")
_SIGNED = (*_GEOMETRIC, *_ENHANCING)
_PLAIN = ("Identity", "AutoContrast", "Equalize")
OPERATIONS = (
    "Identity", *_SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
"""What policies choose from, in torchvision's order."""


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """`num_ops` operations at one magnitude, a position among `bins` from nothing to the most.

    Source: Cubuk et al. 2019, https://arxiv.org/abs/1909.13719. torchvision interpolates `nearest`
    unless told; its reference training script, and this default, are `bilinear`.

    Raises:
      DataError: `magnitude` is not one of 0..`bins` - 1.
    """

    num_ops: int = 2
    magnitude: int = 9
    bins: int = 31
    interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        if not 0 <= self.magnitude < self.bins:
            raise DataError(f"{self}: magnitude must lie in 0..{self.bins - 1}, below bins.")

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[Step, ...]:
        """Steps for an image of this size: each operation is as likely, as is each sign."""
        most = {
            "Shear": 0.3,
            "TranslateX": 150 / 331 * width,
            "TranslateY": 150 / 331 * height,
            "Rotate": 30.0,
            "Enhance": 0.9,
            "Posterize": 4,
        }
        steps = []
        for _ in range(self.num_ops):
            name = OPERATIONS[rng.integers(len(OPERATIONS))]
            levels = _levels(name, most, self.bins)
            magnitude = 0.0 if levels is None else float(levels[self.magnitude])
            steps.append((name, _signed(name, magnitude, rng)))
        return tuple(steps)


@dataclass(frozen=True, kw_only=True)
class TrivialAugmentWide:
    """One operation at a random magnitude among `bins`.

    Source: Müller and Hutter 2021, https://arxiv.org/abs/2103.10158. For `interpolation` see
    `RandAugment`.
    """

    bins: int = 31
    interpolation: Interpolation = "bilinear"

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[Step, ...]:
        """The one step; translations are in pixels, whatever the image's size."""
        most = {
            "Shear": 0.99,
            "TranslateX": 32.0,
            "TranslateY": 32.0,
            "Rotate": 135.0,
            "Enhance": 0.99,
            "Posterize": 6,
        }
        name = OPERATIONS[rng.integers(len(OPERATIONS))]
        levels = _levels(name, most, self.bins)
        magnitude = 0.0 if levels is None else float(levels[rng.integers(self.bins)])
        return ((name, _signed(name, magnitude, rng)),)


def _levels(name: str, most: dict[str, float], bins: int) -> np.ndarray | None:
    """The magnitudes of an operation, [bins]; None for one that has none."""
    if name in _PLAIN:
        return None
    if name == "Posterize":  # bits that are kept
        lost = np.arange(bins, dtype=np.float32) / np.float32((bins - 1) / most[name])
        return 8 - np.rint(lost).astype(int)
    if name == "Solarize":  # the level from which on colours are inverted
        return _linspace(255.0, 0.0, bins)
    kind = "Shear" if name.startswith("Shear") else "Enhance" if name in _ENHANCING else name
    return _linspace(0.0, most[kind], bins)


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """`torch.linspace` as float32, to the last bit for torchvision's 31 bins.

    There the lower half is counted from the start and the rest from the end, each sum rounded
    once, as a fused multiply-add does. One pixel hangs on it: half of TrivialAugment's 32 pixels
    is truncated to 15 there; torch on a CPU without AVX2 rounds twice and moves by 16.
    """
    step = float(np.float32(np.float32(stop) - np.float32(start)) / np.float32(count - 1))
    k = np.arange(count)
    first, last = float(np.float32(start)), float(np.float32(stop))
    levels = np.where(k < count // 2, first + step * k, last - step * (count - 1 - k))
    return levels.astype(np.float32)


def _signed(name: str, magnitude: float, rng: np.random.Generator) -> float:
    return -magnitude if name in _SIGNED and rng.integers(2) else magnitude


def apply(
    image: Image.Image,
    step: Step,
    interpolation: Interpolation = "bilinear",
    fill: tuple[int, int, int] = (0, 0, 0),
) -> Image.Image:
    """The RGB image after one step; `fill` is the colour of what comes in from outside it."""
    name, magnitude = step
    if name in _GEOMETRIC:
        return _move(image, name, magnitude, RESAMPLING[interpolation], fill)
    return _COLORING[name](image, magnitude)


def _move(
    image: Image.Image,
    name: str,
    magnitude: float,
    resampling: Image.Resampling,
    fill: tuple[int, int, int],
) -> Image.Image:
    if name == "Rotate":
        return image.rotate(magnitude, resampling, fillcolor=fill)
    # The inverse map: where in the image does each pixel come from? Angles go by way of degrees,
    # their tangents are formed and pixels truncated as there: the last bit can move an edge.
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    angle, pixels = math.radians(math.degrees(math.atan(magnitude))), float(int(magnitude))
    if name == "ShearX":
        b = math.tan(angle)
    elif name == "ShearY":
        d = math.sin(angle) / math.cos(angle)
    elif name == "TranslateX":
        c = -pixels
    else:
        f = -pixels
    matrix = (a, b, c, d, e, f)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resampling, fillcolor=fill)


_COLORING: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "Identity": lambda image, _: image,
    "Brightness": lambda image, magnitude: adjust(image, "brightness", 1.0 + magnitude),
    "Color": lambda image, magnitude: adjust(image, "saturation", 1.0 + magnitude),
    "Contrast": lambda image, magnitude: adjust(image, "contrast", 1.0 + magnitude),
    "Sharpness": lambda image, magnitude: ImageEnhance.Sharpness(image).enhance(1.0 + magnitude),
    "Posterize": lambda image, magnitude: ImageOps.posterize(image, int(magnitude)),
    "Solarize": lambda image, magnitude: ImageOps.solarize(image, magnitude),  # type: ignore
    "AutoContrast": lambda image, _: ImageOps.autocontrast(image),
    "Equalize": lambda image, _: ImageOps.equalize(image),
}
