"""Named augmentations, each defined as a `View`."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from jaxft.data import autoaugment, color, geometry
from jaxft.data.source import Source, pixel_type
from jaxft.errors import DataError
from jaxft.stage_options import Augment


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


def apply_view(image: Image.Image, view: View, rng: np.random.Generator) -> Image.Image:
    """Applies all steps of a view except the crop."""
    # Inactive steps draw no random numbers, so that new fields leave existing views unchanged.
    if view.hflip and rng.random() < view.hflip:
        image = geometry.hflip(image)
    if view.vflip and rng.random() < view.vflip:
        image = geometry.vflip(image)
    if view.color_jitter is not None:
        for channel, factor in view.color_jitter.draw(rng):
            image = color.adjust(image, channel, factor)
    if view.policy is not None:
        for operation in view.policy.draw(image.height, image.width, rng):
            image = autoaugment.apply(image, operation, view.policy.interpolation)
    return image
