"""EfficientNet-B0 to B4 and MobileNetV3 by timm's names."""

import math
from dataclasses import replace

from jaxft.data.preprocessing import Preprocessing
from jaxft.models.key_map import KeyMap, Rename
from jaxft.models.layers import make_divisible
from jaxft.models.networks.efficientnet import BlockConfig, EfficientNet, EfficientNetConfig
from jaxft.models.registry import register

KEY_MAP = KeyMap((Rename(r"(?:fc|head)\.(weight|bias)", "classifier.{0}"),))
"""Common names of a last layer."""

_EFFICIENTNET = (
    BlockConfig(1, 3, 1, 1, 16, True),
    BlockConfig(2, 3, 2, 6, 24, True),
    BlockConfig(2, 5, 2, 6, 40, True),
    BlockConfig(3, 3, 2, 6, 80, True),
    BlockConfig(3, 5, 1, 6, 112, True),
    BlockConfig(4, 5, 2, 6, 192, True),
    BlockConfig(1, 3, 1, 6, 320, True),
)
_LARGE = (
    (BlockConfig(1, 3, 1, 1, 16, activation="relu"),),
    (
        BlockConfig(1, 3, 2, 4, 24, activation="relu"),
        BlockConfig(1, 3, 1, 3, 24, activation="relu"),
    ),
    (BlockConfig(3, 5, 2, 3, 40, True, "relu"),),
    (BlockConfig(1, 3, 2, 6, 80), BlockConfig(1, 3, 1, 2.5, 80), BlockConfig(2, 3, 1, 2.3, 80)),
    (BlockConfig(2, 3, 1, 6, 112, True),),
    (BlockConfig(3, 5, 2, 6, 160, True),),
    (BlockConfig(1, 1, 1, None, 960),),
)
_SMALL = (
    (BlockConfig(1, 3, 2, 1, 16, True, "relu"),),
    (
        BlockConfig(1, 3, 2, 4.5, 24, activation="relu"),
        BlockConfig(1, 3, 1, 3.67, 24, activation="relu"),
    ),
    (BlockConfig(1, 5, 2, 4, 40, True), BlockConfig(2, 5, 1, 6, 40, True)),
    (BlockConfig(2, 5, 1, 3, 48, True),),
    (BlockConfig(3, 5, 2, 6, 96, True),),
    (BlockConfig(1, 1, 1, None, 576),),
)


def _efficientnet(width: float, depth: float) -> EfficientNetConfig:
    return EfficientNetConfig(
        stages=tuple((replace(b, repeats=math.ceil(b.repeats * depth)),) for b in _EFFICIENTNET),
        stem_width=make_divisible(32 * width),
        features=make_divisible(1280 * width),
        width_multiplier=width,
    )


def _mobilenet(size: str, width: float) -> EfficientNetConfig:
    return EfficientNetConfig(
        stages=_LARGE if size == "large" else _SMALL,
        stem_width=16 if width < 0.75 else make_divisible(16 * width),
        features=1280 if size == "large" else 1024,
        width_multiplier=width,
        activation="hard_swish",
        mobile=True,
    )


_HALF = (0.5, 0.5, 0.5)
_NETWORKS = {
    "efficientnet_b0": (_efficientnet(1.0, 1.0), Preprocessing.timm()),
    "efficientnet_b1": (
        _efficientnet(1.0, 1.1),
        Preprocessing.timm(240, 0.9, mean=_HALF, std=_HALF),
    ),
    "efficientnet_b2": (_efficientnet(1.1, 1.2), Preprocessing.timm(256)),
    "efficientnet_b3": (_efficientnet(1.2, 1.4), Preprocessing.timm(288)),
    "efficientnet_b4": (_efficientnet(1.4, 1.8), Preprocessing.timm(320)),
    "mobilenetv3_large_075": (
        _mobilenet("large", 0.75),
        Preprocessing.timm(interpolation="bilinear"),
    ),
    "mobilenetv3_large_100": (_mobilenet("large", 1.0), Preprocessing.timm()),
    "mobilenetv3_small_050": (_mobilenet("small", 0.5), Preprocessing.timm()),
    "mobilenetv3_small_075": (_mobilenet("small", 0.75), Preprocessing.timm()),
    "mobilenetv3_small_100": (_mobilenet("small", 1.0), Preprocessing.timm()),
}
NAMES = tuple(_NETWORKS)

for _name, (_config, _preprocessing) in _NETWORKS.items():
    register(
        _name,
        EfficientNet,
        _config,
        key_map=KEY_MAP,
        preprocessing=_preprocessing,
        torch_library="timm",
    )
