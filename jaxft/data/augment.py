"""Augmentations by name, as plain data: what each does to an image before it is trained on."""

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
    """The steps of a training view, in the order in which they are taken.

    frame: `eval`: as in evaluation; `box`: a random box of the image, scaled to the input size;
      `shift`: as in evaluation, then moved by up to an eighth of its side.
    mirror, upend: how often left and right, and top and bottom, change places; 0 to 1.
    jitter, policy: what happens to its colours, and more; None: nothing.
    """

    frame: Literal["eval", "box", "shift"] = "eval"
    mirror: float = 0.0
    upend: float = 0.0
    jitter: color.Jitter | None = None
    policy: autoaugment.RandAugment | autoaugment.TrivialAugmentWide | None = None


VIEWS: dict[str, View] = {
    "none": View(),
    "crop_flip": View(frame="box", mirror=0.5),
    "shift": View(frame="shift"),
    "shift_flip": View(frame="shift", mirror=0.5),
    "flip": View(mirror=0.5),
    "jitter": View(
        frame="box",
        mirror=0.5,
        jitter=color.Jitter(brightness=0.4, contrast=0.4, saturation=0.4),
    ),
    "randaugment": View(frame="box", mirror=0.5, policy=autoaugment.RandAugment()),
    "trivialaugment": View(frame="box", mirror=0.5, policy=autoaugment.TrivialAugmentWide()),
}
"""What each name of `Augment` stands for."""


def view_of(augment: Augment | View) -> View:
    """Returns the view, or that of the name; DataError if there is none."""
    view = augment if isinstance(augment, View) else VIEWS.get(augment)
    if view is None:
        raise DataError(f"unknown augment '{augment}': use one of {', '.join(VIEWS)}.")
    return view


def check_view(source: Source, augment: Augment | View) -> None:
    """Checks that a view can be made of the source's images.

    Raises:
      DataError: it is unknown; or it changes colours, and the images are normalised floats.
    """
    view = view_of(augment)
    if pixel_type(source) != np.uint8 and (view.jitter or view.policy):
        plain = [name for name, each in VIEWS.items() if not (each.jitter or each.policy)]
        raise DataError(
            f"augment={augment if isinstance(augment, str) else 'View(...)'} changes colours of "
            f"0..255, and these images are normalised floats: use one of {', '.join(plain)}, or "
            "give the images as uint8."
        )


def vary(image: Image.Image, view: View, rng: np.random.Generator) -> Image.Image:
    """All of a view but its frame: mirrored, recoloured, and whatever its policy draws."""
    # What a view leaves out draws no numbers: adding a field changes no view that lacks it.
    if view.mirror and rng.random() < view.mirror:
        image = geometry.mirror(image)
    if view.upend and rng.random() < view.upend:
        image = geometry.upend(image)
    if view.jitter is not None:
        for channel, factor in view.jitter.draw(rng):
            image = color.adjust(image, channel, factor)
    if view.policy is not None:
        for step in view.policy.draw(image.height, image.width, rng):
            image = autoaugment.apply(image, step, view.policy.interpolation)
    return image
