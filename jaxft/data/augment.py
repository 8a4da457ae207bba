"""Named augmentations, each defined as a `View`."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32
from PIL import Image

from jaxft.data import autoaugment, color, geometry
from jaxft.data.source import Source, pixel_type
from jaxft.errors import DataError
from jaxft.stage_options import Augment

CHANNELS: tuple[color.Channel, ...] = ("brightness", "contrast", "saturation")
"""Colour changes that can run on the device."""
ENCODED_SIZE = 3 + 2 * len(CHANNELS)
"""Length of `DrawnSteps.encoded`."""


@dataclass(frozen=True, kw_only=True)
class View:
    """Steps of a random training view, applied in the order of the fields.

    Attributes:
      crop: `center`: the evaluation crop; `random_resized`: a random box scaled to the input size;
        `shift`: the evaluation crop, moved by up to an eighth of its side.
      hflip: probability of a horizontal flip.
      vflip: probability of a vertical flip.
      color_jitter: random colour changes, or None.
      policy: an automatic augmentation policy, or None.
    """

    crop: Literal["center", "random_resized", "shift"] = "center"
    hflip: float = 0.0
    vflip: float = 0.0
    color_jitter: color.ColorJitter | None = None
    policy: autoaugment.RandAugment | autoaugment.TrivialAugmentWide | None = None

    @property
    def runs_on_device(self) -> bool:
        """Whether the device can apply all steps after the crop, of which there is at least one.

        Vertical flips, hue and policies run on the host only.
        """
        jitter = self.color_jitter
        if self.vflip or self.policy or (jitter and jitter.hue):
            return False
        return self.crop == "shift" or bool(self.hflip or jitter)


VIEWS: dict[str, View] = {
    "none": View(),
    "crop_flip": View(crop="random_resized", hflip=0.5),
    "shift": View(crop="shift"),
    "shift_flip": View(crop="shift", hflip=0.5),
    "flip": View(hflip=0.5),
    "jitter": View(
        crop="random_resized",
        hflip=0.5,
        color_jitter=color.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4),
    ),
    "randaugment": View(crop="random_resized", hflip=0.5, policy=autoaugment.RandAugment()),
    "trivialaugment": View(
        crop="random_resized", hflip=0.5, policy=autoaugment.TrivialAugmentWide()
    ),
}
"""The view of each `Augment` name."""


def resolve_view(augment: Augment | View) -> View:
    """Returns the view of a name; returns a `View` unchanged.

    Raises:
      DataError: the name is unknown.
    """
    view = augment if isinstance(augment, View) else VIEWS.get(augment)
    if view is None:
        raise DataError(f"unknown augment '{augment}': use one of {', '.join(VIEWS)}.")
    return view


def check_view(source: Source, augment: Augment | View) -> None:
    """Checks that the augmentation suits the source's images.

    Raises:
      DataError: it is unknown, or it changes colours and the images are normalised floats.
    """
    view = resolve_view(augment)
    if pixel_type(source) != np.uint8 and (view.color_jitter or view.policy):
        geometric = [name for name, v in VIEWS.items() if not (v.color_jitter or v.policy)]
        raise DataError(
            f"augment={augment if isinstance(augment, str) else 'View(...)'} changes colours of "
            "0..255, and these images are normalised floats: use one of "
            f"{', '.join(geometric)}, or give the images as uint8."
        )


class DrawnSteps(NamedTuple):
    """Drawn steps of a view that follow its crop; see `View`.

    Attributes:
      offset: shift (down, right) in pixels.
      hflip, vflip: whether the image is flipped.
      colors: arguments of `color.adjust`.
      operations: operations of the policy.
    """

    offset: tuple[int, int]
    hflip: bool
    vflip: bool
    colors: tuple[tuple[color.Channel, float], ...]
    operations: tuple[autoaugment.Operation, ...]

    def encoded(self) -> Float32[np.ndarray, "9"]:
        """Returns the steps as an array for the device: offset, hflip, 3 channels, 3 factors."""
        unused: tuple[color.Channel, float] = ("brightness", 1.0)  # leaves the image as it is
        colors = (*self.colors, *[unused] * (len(CHANNELS) - len(self.colors)))
        channels = [CHANNELS.index(channel) for channel, _ in colors]
        factors = [factor for _, factor in colors]
        return np.array([*self.offset, self.hflip, *channels, *factors], np.float32)


def draw_steps(view: View, image_size: int, rng: np.random.Generator) -> DrawnSteps:
    """Draws all steps of a view except the crop.

    Args:
      view: the view.
      image_size: height and width of the crop.
      rng: source of the random numbers.
    """
    # In the order of the fields. Inactive steps draw no random numbers, so that new fields leave
    # existing views unchanged.
    shifts = view.crop == "shift"
    return DrawnSteps(
        offset=geometry.random_offset(max(1, image_size // 8), rng) if shifts else (0, 0),
        hflip=bool(view.hflip) and rng.random() < view.hflip,
        vflip=bool(view.vflip) and rng.random() < view.vflip,
        colors=view.color_jitter.draw(rng) if view.color_jitter else (),
        operations=view.policy.draw(image_size, image_size, rng) if view.policy else (),
    )


def apply_steps(image: Image.Image, steps: DrawnSteps, view: View) -> Image.Image:
    """Applies drawn steps of a view to a crop."""
    if view.crop == "shift":
        image = geometry.shift(image, steps.offset)
    if steps.hflip:
        image = geometry.hflip(image)
    if steps.vflip:
        image = geometry.vflip(image)
    for channel, factor in steps.colors:
        image = color.adjust(image, channel, factor)
    for operation in steps.operations:
        assert view.policy
        image = autoaugment.apply(image, operation, view.policy.interpolation)
    return image
