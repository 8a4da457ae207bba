"""Adjusts brightness, contrast, saturation and hue; pixels equal torchvision's `ColorJitter`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageEnhance

from jaxft.errors import DataError

Channel = Literal["brightness", "contrast", "saturation", "hue"]

_ENHANCERS = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@dataclass(frozen=True, kw_only=True)
class ColorJitter:
    """Ranges of random colour changes, as the arguments of torchvision's `ColorJitter`.

    Attributes:
      brightness: the factor is uniform in max(0, 1 - brightness)..1 + brightness.
      contrast: the same for the contrast.
      saturation: the same for the saturation.
      hue: the hue is rotated by a fraction of the colour circle, uniform in -hue..hue; at most 0.5.

    Raises:
      DataError: a value is negative, or hue is above 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        if min(self.brightness, self.contrast, self.saturation, self.hue) < 0 or self.hue > 0.5:
            raise DataError(f"{self}: none may be negative, nor hue above 0.5, half of the circle.")

    def draw(self, rng: np.random.Generator) -> tuple[tuple[Channel, float], ...]:
        """Draws the arguments of `adjust` for each change, in a random order."""
        ranges: dict[Channel, tuple[float, float]] = {
            "brightness": (max(0.0, 1 - self.brightness), 1 + self.brightness),
            "contrast": (max(0.0, 1 - self.contrast), 1 + self.contrast),
            "saturation": (max(0.0, 1 - self.saturation), 1 + self.saturation),
            "hue": (-self.hue, self.hue),
        }
        factors = [
            (channel, float(rng.uniform(low, high)))
            for channel, (low, high) in ranges.items()
            if low != high
        ]
        return tuple(factors[k] for k in rng.permutation(len(factors)))


def adjust(image: Image.Image, channel: Channel, factor: float) -> Image.Image:
    """Adjusts one property of an RGB image, as torchvision's `adjust_brightness`, `adjust_hue` etc.

    Args:
      image: an RGB image.
      channel: the property.
      factor: a factor, 1 for no change; for hue a fraction of the colour circle in -0.5..0.5.
    """
    if channel == "hue":
        hue, saturation, value = image.convert("HSV").split()
        # As in torchvision, truncates the offset; uint8 wraps around the circle's 256 levels.
        rotated = np.asarray(hue) + np.int32(factor * 255).astype(np.uint8)
        bands = (Image.fromarray(rotated), saturation, value)
        return Image.merge("HSV", bands).convert("RGB")
    return _ENHANCERS[channel](image).enhance(factor)
