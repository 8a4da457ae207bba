"""Other libraries' names for the tensors of our networks, as torchvision's."""

import re
from collections.abc import Iterable, Mapping

from jaxft.errors import WeightsError

# (pattern, target): {0} takes the pattern's first group, {after0} the number after it. The first
# that matches a whole name counts; a name that none matches is torchvision's, or timm's, already.
_TABLE = (
    # Transformers' ResNet, such as microsoft/resnet-50.
    (r"(?:resnet\.)?embedder\.embedder\.convolution\.(\w+)", "conv1.{0}"),
    (r"(?:resnet\.)?embedder\.embedder\.normalization\.(\w+)", "bn1.{0}"),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.convolution\.(\w+)",
        "layer{after0}.{1}.downsample.0.{2}",
    ),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.normalization\.(\w+)",
        "layer{after0}.{1}.downsample.1.{2}",
    ),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.convolution\.(\w+)",
        "layer{after0}.{1}.conv{after2}.{3}",
    ),
    (
        r"(?:resnet\.)?encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.normalization\.(\w+)",
        "layer{after0}.{1}.bn{after2}.{3}",
    ),
    (r"classifier\.1\.(\w+)", "fc.{0}"),
    # What else a last layer is called.
    (r"(?:classifier|head|last_linear)\.(weight|bias)", "fc.{0}"),
    # The CIFAR ResNets of akamaster/pytorch_resnet_cifar10.
    (r"linear\.(\w+)", "fc.{0}"),
)


def renamed(names: Iterable[str], source: str) -> Mapping[str, str]:
    """torchvision's name for each of `names`.

    Raises WeightsError where two of them mean the same tensor.
    """
    names = list(names)
    targets = {name: rename(name) for name in names}
    # What has torchvision's name already is the tensor; what only might be it is another.
    targets = {n: n if n != t and t in targets else t for n, t in targets.items()}
    origins: dict[str, list[str]] = {}
    for name, target in targets.items():
        origins.setdefault(target, []).append(name)
    if twice := [f"{' and '.join(o)} (both {t})" for t, o in origins.items() if len(o) > 1]:
        raise WeightsError(f"{source} has two tensors for one: {', '.join(twice)}")
    return targets


def rename(name: str) -> str:
    """torchvision's name for a tensor."""
    for pattern, target in _TABLE:
        if found := re.fullmatch(pattern, name):
            groups = enumerate(found.groups())
            after = {f"after{i}": int(group) + 1 for i, group in groups if group.isdecimal()}
            return target.format(*found.groups(), **after)
    return name
