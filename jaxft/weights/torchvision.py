"""URLs and preprocessing of the weights that torchvision publishes, without torchvision."""

import difflib
from dataclasses import dataclass

from jaxft.data.preprocessing import Preprocessing
from jaxft.errors import WeightsError

BASE = "https://download.pytorch.org/models/"

# (file, shorter side before the crop). The last member of each enum is torchvision's DEFAULT.
_FILES: dict[str, dict[str, tuple[str, int]]] = {
    "ResNet18_Weights": {
        "IMAGENET1K_V1": ("resnet18-f37072fd.pth", 256),
    },
    "ResNet34_Weights": {
        "IMAGENET1K_V1": ("resnet34-b627a593.pth", 256),
    },
    "ResNet50_Weights": {
        "IMAGENET1K_V1": ("resnet50-0676ba61.pth", 256),
        "IMAGENET1K_V2": ("resnet50-11ad3fa6.pth", 232),
    },
    "ResNet101_Weights": {
        "IMAGENET1K_V1": ("resnet101-63fe2227.pth", 256),
        "IMAGENET1K_V2": ("resnet101-cd907fc2.pth", 232),
    },
    "ResNet152_Weights": {
        "IMAGENET1K_V1": ("resnet152-394f9c45.pth", 256),
        "IMAGENET1K_V2": ("resnet152-f82ba261.pth", 232),
    },
    "ResNeXt50_32X4D_Weights": {
        "IMAGENET1K_V1": ("resnext50_32x4d-7cdf4587.pth", 256),
        "IMAGENET1K_V2": ("resnext50_32x4d-1a0047aa.pth", 232),
    },
    "ResNeXt101_32X8D_Weights": {
        "IMAGENET1K_V1": ("resnext101_32x8d-8ba56ff5.pth", 256),
        "IMAGENET1K_V2": ("resnext101_32x8d-110c445d.pth", 232),
    },
    "ResNeXt101_64X4D_Weights": {
        "IMAGENET1K_V1": ("resnext101_64x4d-173b62eb.pth", 232),
    },
    "Wide_ResNet50_2_Weights": {
        "IMAGENET1K_V1": ("wide_resnet50_2-95faca4d.pth", 256),
        "IMAGENET1K_V2": ("wide_resnet50_2-9ba9bcbe.pth", 232),
    },
    "Wide_ResNet101_2_Weights": {
        "IMAGENET1K_V1": ("wide_resnet101_2-32ee1156.pth", 256),
        "IMAGENET1K_V2": ("wide_resnet101_2-d733dc28.pth", 232),
    },
}


@dataclass(frozen=True)
class PublishedWeights:
    """Weights file that torchvision publishes.

    Attributes:
      url: URL of the file.
      sha256: First digits of its hash, in hex.
      preprocessing: Preprocessing of the images in torchvision's evaluation.
    """

    url: str
    sha256: str
    preprocessing: Preprocessing


def published_weights(name: str) -> PublishedWeights:
    """Returns the weights file for torchvision's name.

    A network's name alone is refused: `IMAGENET1K_V1` and `IMAGENET1K_V2` were trained by different
    recipes and fine-tune differently, and a default would hide which one was used.

    Args:
      name: `ResNet50_Weights.IMAGENET1K_V2`, or `ResNet50_Weights.DEFAULT`.

    Raises:
      WeightsError: There are no such weights. The message suggests similar names.
    """
    enum, _, member = name.partition(".")
    members = _FILES.get(enum, {})
    if members and member == "DEFAULT":
        member = list(members)[-1]
    if member not in members:
        raise WeightsError(f"torchvision:{name}: {_suggest(enum)}")
    file, resize_size = members[member]
    return PublishedWeights(
        url=BASE + file,
        sha256=file.removesuffix(".pth").rpartition("-")[2],
        preprocessing=Preprocessing(image_size=224, resize_size=resize_size),
    )


def _suggest(enum: str) -> str:
    # `resnet50`, `ResNet50` and `resnet50_weights` all mean the same enum.
    enums = {known.lower().removesuffix("_weights"): known for known in _FILES}
    wanted = enum.lower().removesuffix("_weights")
    near = [wanted] if wanted in enums else difflib.get_close_matches(wanted, enums, n=2)
    if not near:
        return f"no such weights. The known ones of torchvision are {', '.join(_FILES)}."
    choices = [f"torchvision:{enums[n]}.{member}" for n in near for member in _FILES[enums[n]]]
    return f"no such weights. Did you mean {' or '.join(choices)}?"


def default_weights(model: str) -> str | None:
    """Returns the source of torchvision's default weights for a network; None if it has none.

    >>> default_weights("resnet50"), default_weights("cifar_resnet8")
    ('torchvision:ResNet50_Weights.IMAGENET1K_V2', None)
    """
    for name, members in _FILES.items():
        if name.lower() == f"{model}_weights":
            return f"torchvision:{name}.{[*members][-1]}"
    return None
