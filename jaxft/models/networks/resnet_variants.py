"""The ResNets by torchvision's and timm's names, and the CIFAR ResNets of He et al."""

from dataclasses import replace

from jaxft.models.key_map import KeyMap, Rename
from jaxft.models.networks.resnet import ResNet, ResNetConfig
from jaxft.models.registry import Library, register

KEY_MAP = KeyMap(
    (
        # ResNets of transformers, such as microsoft/resnet-50.
        Rename(r"(?:resnet\.)?embedder\.embedder\.convolution\.(\w+)", "conv1.{0}"),
        Rename(r"(?:resnet\.)?embedder\.embedder\.normalization\.(\w+)", "bn1.{0}"),
        Rename(
            r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.(\w+)",
            "layer{after0}.{1}.downsample.0.{2}",
        ),
        Rename(
            r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.(\w+)",
            "layer{after0}.{1}.downsample.1.{2}",
        ),
        Rename(
            r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.(\w+)",
            "layer{after0}.{1}.conv{after2}.{3}",
        ),
        Rename(
            r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.(\w+)",
            "layer{after0}.{1}.bn{after2}.{3}",
        ),
        Rename(r"classifier\.1\.(\w+)", "fc.{0}"),
        # Common names of a last layer.
        Rename(r"(?:classifier|head|last_linear)\.(weight|bias)", "fc.{0}"),
        # CIFAR ResNets of akamaster/pytorch_resnet_cifar10.
        Rename(r"linear\.(\w+)", "fc.{0}"),
    )
)


def _basic(*depths: int) -> ResNetConfig:
    return ResNetConfig("imagenet", depths)


def _bottleneck(*depths: int, groups: int = 1, base_width: int = 64) -> ResNetConfig:
    return ResNetConfig("imagenet", depths, bottleneck=True, groups=groups, base_width=base_width)


_PLAIN = {
    "resnet10": _basic(1, 1, 1, 1),
    "resnet14": _bottleneck(1, 1, 1, 1),
    "resnet18": _basic(2, 2, 2, 2),
    "resnet26": _bottleneck(2, 2, 2, 2),
    "resnet34": _basic(3, 4, 6, 3),
    "resnet50": _bottleneck(3, 4, 6, 3),
    "resnet101": _bottleneck(3, 4, 23, 3),
    "resnet152": _bottleneck(3, 8, 36, 3),
    "resnet200": _bottleneck(3, 24, 36, 3),
    "resnext50_32x4d": _bottleneck(3, 4, 6, 3, groups=32, base_width=4),
    "resnext101_32x4d": _bottleneck(3, 4, 23, 3, groups=32, base_width=4),
    "resnext101_32x8d": _bottleneck(3, 4, 23, 3, groups=32, base_width=8),
    "resnext101_32x16d": _bottleneck(3, 4, 23, 3, groups=32, base_width=16),
    "resnext101_32x32d": _bottleneck(3, 4, 23, 3, groups=32, base_width=32),
    "resnext101_64x4d": _bottleneck(3, 4, 23, 3, groups=64, base_width=4),
    "wide_resnet50_2": _bottleneck(3, 4, 6, 3, base_width=128),
    "wide_resnet101_2": _bottleneck(3, 4, 23, 3, base_width=128),
}
# timm's letters: (widths of the stem, whether shortcuts average).
_VARIANTS = {
    "c": ((32, 32), False),
    "d": ((32, 32), True),
    "s": ((64, 64), False),
    "t": ((24, 32), True),
}
_DEPTHS = {
    "c": (50, 101, 152),
    "d": (18, 26, 34, 50, 101, 152, 200),
    "s": (50, 101, 152),
    "t": (10, 14, 26, 50),
}


def variant(config: ResNetConfig, letter: str) -> ResNetConfig:
    """Returns the configuration with the stem and shortcuts that timm marks by a letter."""
    stem, average = _VARIANTS[letter]
    return replace(config, stem=stem, average_shortcut=average)


CONFIGS = {
    **{name: c for name, c in _PLAIN.items() if name not in ("resnet10", "resnet14")},
    **{
        f"resnet{depth}{letter}": variant(_PLAIN[f"resnet{depth}"], letter)
        for letter, depths in _DEPTHS.items()
        for depth in depths
    },
    "resnext50d_32x4d": variant(_PLAIN["resnext50_32x4d"], "d"),
    # Depth 6n + 2: two convolutions in each of 3n blocks, the stem and the head.
    **{f"cifar_resnet{6 * n + 2}": ResNetConfig("cifar", (n, n, n)) for n in (1, 3, 5, 7, 9, 18)},
}
_TORCHVISION = {
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
    "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
}  # fmt: skip

for _name, _config in CONFIGS.items():
    _library: Library = "torchvision" if _name in _TORCHVISION else "timm"
    _library = None if _config.layout == "cifar" else _library
    register(_name, ResNet, _config, key_map=KEY_MAP, torch_library=_library)
