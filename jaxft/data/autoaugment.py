"""RandAugment and TrivialAugment, equal to torchvision's on PIL images.

A policy draws operations and their magnitudes; `apply` applies one operation. Names, ranges and
float32 magnitudes are torchvision's.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from jaxft.data.color import adjust
from jaxft.data.geometry import RESAMPLING, Interpolation
from jaxft.errors import DataError

Operation = tuple[str, float]
"""Name and magnitude of an operation; the magnitude is 0 if the operation has none."""

_AFFINE = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_ENHANCEMENTS = ("Brightness", "Color", "Contrast", "Sharpness")
_SIGNED = (*_AFFINE, *_ENHANCEMENTS)
_WITHOUT_MAGNITUDE = ("Identity", "AutoContrast", "Equalize")
OPERATIONS = (
    "Identity", *_SIGNED, "Posterize", "Solarize", "AutoContrast", "Equalize",
)  # fmt: skip
"""Names of all operations, in torchvision's order."""


@dataclass(frozen=True, kw_only=True)
class RandAugment:
    """RandAugment: random operations at a fixed magnitude.

    Reference: Cubuk et al. 2019, https://arxiv.org/abs/1909.13719.

    Attributes:
      num_ops: operations per image.
      magnitude: index of the magnitude among `bins` equal steps from 0 to the maximum.
      bins: number of magnitudes.
      interpolation: filter of geometric operations. The default follows torchvision's reference
        training script; torchvision's class defaults to `nearest`.

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

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[Operation, ...]:
        """Draws the operations for an image of this size; operations and signs are uniform."""
        max_magnitudes = {
            "Shear": 0.3,
            "TranslateX": 150 / 331 * width,
            "TranslateY": 150 / 331 * height,
            "Rotate": 30.0,
            "Enhance": 0.9,
            "Posterize": 4,
        }
        operations = []
        for _ in range(self.num_ops):
            name = OPERATIONS[rng.integers(len(OPERATIONS))]
            magnitudes = _magnitudes(name, max_magnitudes, self.bins)
            magnitude = 0.0 if magnitudes is None else float(magnitudes[self.magnitude])
            operations.append((name, _random_sign(name, magnitude, rng)))
        return tuple(operations)


@dataclass(frozen=True, kw_only=True)
class TrivialAugmentWide:
    """TrivialAugment (wide): one random operation at a random magnitude.

    Reference: Müller and Hutter 2021, https://arxiv.org/abs/2103.10158.

    Attributes:
      bins: number of magnitudes.
      interpolation: as in `RandAugment`.
    """

    bins: int = 31
    interpolation: Interpolation = "bilinear"

    def draw(self, height: int, width: int, rng: np.random.Generator) -> tuple[Operation, ...]:
        """Draws one operation; its distribution does not depend on the image's size."""
        max_magnitudes = {
            "Shear": 0.99,
            "TranslateX": 32.0,
            "TranslateY": 32.0,
            "Rotate": 135.0,
            "Enhance": 0.99,
            "Posterize": 6,
        }
        name = OPERATIONS[rng.integers(len(OPERATIONS))]
        magnitudes = _magnitudes(name, max_magnitudes, self.bins)
        magnitude = 0.0 if magnitudes is None else float(magnitudes[rng.integers(self.bins)])
        return ((name, _random_sign(name, magnitude, rng)),)


def _magnitudes(name: str, max_magnitudes: dict[str, float], bins: int) -> np.ndarray | None:
    """Returns the magnitudes of an operation, [bins], or None if it has none."""
    if name in _WITHOUT_MAGNITUDE:
        return None
    if name == "Posterize":  # number of bits to keep
        step = np.float32((bins - 1) / max_magnitudes[name])
        dropped_bits = np.arange(bins, dtype=np.float32) / step
        return 8 - np.rint(dropped_bits).astype(int)
    if name == "Solarize":  # level above which colours are inverted
        return _linspace(255.0, 0.0, bins)
    kind = "Shear" if name.startswith("Shear") else "Enhance" if name in _ENHANCEMENTS else name
    return _linspace(0.0, max_magnitudes[kind], bins)


def _linspace(start: float, stop: float, count: int) -> np.ndarray:
    """Returns `torch.linspace` in float32, bit for bit for torchvision's 31 bins.

    torch counts the lower half from the start and the upper half from the end, and rounds each
    sum once, with a fused multiply-add. The last bit matters: the middle one of TrivialAugment's
    translations (0..32 pixels) is truncated to 15 pixels. On a CPU without AVX2, torch rounds twice
    and gets 16.
    """
    step = float(np.float32(np.float32(stop) - np.float32(start)) / np.float32(count - 1))
    k = np.arange(count)
    first, last = float(np.float32(start)), float(np.float32(stop))
    levels = np.where(k < count // 2, first + step * k, last - step * (count - 1 - k))
    return levels.astype(np.float32)


def _random_sign(name: str, magnitude: float, rng: np.random.Generator) -> float:
    return -magnitude if name in _SIGNED and rng.integers(2) else magnitude


def apply(
    image: Image.Image,
    operation: Operation,
    interpolation: Interpolation = "bilinear",
    fill: tuple[int, int, int] = (0, 0, 0),
) -> Image.Image:
    """Applies an operation to an RGB image; `fill` is the colour of pixels from outside of it."""
    name, magnitude = operation
    if name in _AFFINE:
        return _apply_affine(image, name, magnitude, RESAMPLING[interpolation], fill)
    return _COLOR_OPERATIONS[name](image, magnitude)


def _apply_affine(
    image: Image.Image,
    name: str,
    magnitude: float,
    resampling: Image.Resampling,
    fill: tuple[int, int, int],
) -> Image.Image:
    if name == "Rotate":
        return image.rotate(magnitude, resampling, fillcolor=fill)
    # The matrix maps output to input coordinates. The detours below (angles via degrees, sin / cos,
    # truncated pixels) are torchvision's: a difference in the last bit can move an edge.
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


_COLOR_OPERATIONS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
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
