"""The cases of test_timm.py: timm's networks, and the options and image sizes to compare."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A network of timm, built as `timm.create_model(name, num_classes=10, **timm_options)`."""

    name: str
    sides: tuple[int, ...] = (64,)
    """Sizes of the images in eval mode."""
    train_side: int | None = 64
    """Size of the images of three training steps; None: no training."""
    timm_options: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    """Options of `jaxft.models.create`."""
    is_sized: bool = False
    """Whether parameters depend on the image size. The network is built for the first of `sides`;
    for other sizes its weights are resized, as timm does when it loads a checkpoint."""


CASES = {
    "resnet10t": Case("resnet10t", (64, 33)),
}
SMOKE = ("resnet10t",)
"""Cases that run by default."""
