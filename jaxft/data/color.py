"""Brightness, contrast, saturation and hue, equal to torchvision's `ColorJitter` on PIL images."""

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
class Jitter:
    """How far colours stray, as the arguments of torchvision's `ColorJitter`; 0 leaves one alone.

    brightness, contrast, saturation: factors are uniform in max(0, 1 - x)..1 + x.
    hue: is turned by a share of the circle that is uniform in -x..x; at most 0.5.

    Raises:
      DataError: one is negative, or hue above 0.5.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0

    def __post_init__(self) -> None:
        if min(self.brightness, self.contrast, self.saturation, self.hue) < 0 or self.hue > 0.5:
            raise DataError(f"{self}: none may be negative, nor hue above 0.5, half of the circle.")

    def draw(self, rng: np.random.Generator) -> tuple[tuple[Channel, float], ...]:
        """What to `adjust`, and by how much, in a random order."""
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
    """One change of an RGB image: a factor, or for hue a share of the circle in -0.5..0.5.

    Source: torchvision `adjust_brightness`, `adjust_contrast`, `adjust_saturation`, `adjust_hue`.
    """
    if channel == "hue":
        hue, saturation, value = image.convert("HSV").split()
        # The circle has 256 levels: the sum wraps around it. Truncated, then wrapped, as there.
        turned = np.asarray(hue) + np.int32(factor * 255).astype(np.uint8)
        parts = (Image.fromarray(turned), saturation, value)
        return Image.merge("HSV", parts).convert("RGB")
    return _ENHANCERS[channel](image).enhance(factor)
