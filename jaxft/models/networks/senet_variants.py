"""ResNets with channel attention by timm's names: SE-ResNets and ECA-ResNets."""

import re

from jaxft.data.preprocessing import Preprocessing
from jaxft.models.networks.resnet import ResNet, ResNetConfig
from jaxft.models.networks.resnet_variants import KEY_MAP, variant
from jaxft.models.registry import register

_DEPTHS = {
    "18": (2, 2, 2, 2),
    "26": (2, 2, 2, 2),
    "34": (3, 4, 6, 3),
    "50": (3, 4, 6, 3),
    "101": (3, 4, 23, 3),
    "152": (3, 8, 36, 3),
    "200": (3, 24, 36, 3),
    "269": (3, 30, 48, 8),
}
# name: (image size, size of the crop relative to the scaled image).
NAMES = {
    "seresnet18": (224, 0.875),
    "seresnet34": (224, 0.875),
    "seresnet50": (224, 0.95),
    "seresnet50t": (224, 0.875),
    "seresnet101": (224, 0.875),
    "seresnet152": (224, 0.875),
    "seresnet152d": (256, 0.95),
    "seresnet200d": (256, 0.875),
    "seresnet269d": (256, 0.875),
    "seresnext26d_32x4d": (224, 0.875),
    "seresnext26t_32x4d": (224, 0.875),
    "seresnext50_32x4d": (224, 0.875),
    "seresnext101_32x4d": (224, 0.875),
    "seresnext101_32x8d": (224, 0.95),
    "seresnext101_64x4d": (224, 0.875),
    "seresnext101d_32x8d": (224, 0.95),
    "ecaresnet26t": (256, 0.875),
    "ecaresnet50d": (224, 0.875),
    "ecaresnet50t": (256, 0.875),
    "ecaresnet101d": (224, 0.875),
    "ecaresnet200d": (256, 0.95),
    "ecaresnet269d": (320, 0.95),
    "ecaresnetlight": (224, 0.875),
    "ecaresnext26t_32x4d": (224, 0.875),
    "ecaresnext50t_32x4d": (224, 0.875),
}
_NAME = re.compile(r"(\d+)([dt]?)(?:_(\d+)x(\d+)d)?$")  # depth, letter, groups, their width
_LIGHT = ResNetConfig(
    "imagenet", (1, 1, 11, 3), bottleneck=True, average_shortcut=True, attention="eca"
)


def _config(name: str) -> ResNetConfig:
    """Returns the configuration that a name such as `seresnext26d_32x4d` describes."""
    ((depth, letter, groups, width),) = _NAME.findall(name)
    config = ResNetConfig(
        "imagenet",
        _DEPTHS[depth],
        bottleneck=depth not in ("18", "34"),
        groups=int(groups or 1),
        base_width=int(width or 64),
        attention="se" if name.startswith("se") else "eca",
    )
    return variant(config, letter) if letter else config


for _name, (_size, _crop_pct) in NAMES.items():
    register(
        _name,
        ResNet,
        _LIGHT if _name == "ecaresnetlight" else _config(_name),
        key_map=KEY_MAP,
        preprocessing=Preprocessing.timm(_size, _crop_pct),
        torch_library="timm",
    )
