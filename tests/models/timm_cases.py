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


def _sized(name: str, depth: int, *sides: int) -> dict[str, Case]:
    """A network with position embeddings, cut to a number of blocks; it trains at the last size."""
    cut = {"depth": depth}
    return {name: Case(name, sides, sides[-1], timm_options=cut, options=cut, is_sized=True)}


CASES = {
    **_sized("vit_tiny_patch16_224", 3, 224, 64),
    **_sized("vit_small_patch32_224", 2, 64),
    **_sized("vit_small_patch14_dinov2", 2, 56, 84),
    **_sized("vit_small_patch14_reg4_dinov2", 1, 84, 56),
    **_sized("vit_base_patch16_siglip_224", 1, 64, 48),
    **_sized("vit_base_patch32_clip_quickgelu_224", 1, 64),
    **_sized("vit_medium_patch16_gap_256", 1, 32),
    **_sized("vit_wee_patch16_reg1_gap_256", 2, 32),
    **_sized("deit3_small_patch16_224", 2, 48),
    "convnext_atto": Case("convnext_atto", (64, 95)),
    "convnext_pico_ols": Case("convnext_pico_ols", (33,), train_side=None),
    "convnext_tiny": Case("convnext_tiny", (224,), train_side=None),
    "convnext_tiny_hnf": Case("convnext_tiny_hnf", (64,), train_side=None),
    "convnextv2_atto": Case("convnextv2_atto", (70,)),
    "seresnet18": Case("seresnet18", (33,)),
    "seresnext26d_32x4d": Case("seresnext26d_32x4d"),
    "ecaresnet26t": Case("ecaresnet26t", (33,)),
    "regnetx_002": Case("regnetx_002"),
    "regnety_002": Case("regnety_002", (33,)),
    "efficientnet_b0": Case("efficientnet_b0"),
    "mobilenetv3_small_100": Case("mobilenetv3_small_100", (33,)),
}
SMOKE = ("vit_small_patch14_dinov2",)
"""Cases that run by default."""
