"""torchvision's published weights by its own names, without torchvision."""

import difflib
from dataclasses import dataclass

from jaxft.data.preprocessing import Preprocessing
from jaxft.errors import WeightsError

BASE = "https://download.pytorch.org/models/"

# (file, shorter side before the crop); in each enum the last is torchvision's DEFAULT.
_TABLE: dict[str, dict[str, tuple[str, int]]] = {
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
class Published:
    """A file, what its sha256 begins with, and the images it was evaluated on."""

    url: str
    sha256: str
    preprocessing: Preprocessing


def published(name: str) -> Published:
    """What torchvision publishes as `ResNet50_Weights.IMAGENET1K_V2`, or `.DEFAULT`.

    A network's bare name is refused: `IMAGENET1K_V1` and `V2` are the fruit of such different
    training that fine-tuning differs as well, and a default hides which one it was.

    Raises:
      WeightsError: there are no such weights; names those that may be meant.
    """
    enum, _, member = name.partition(".")
    members = _TABLE.get(enum, {})
    if members and member == "DEFAULT":
        member = list(members)[-1]
    if member not in members:
        raise WeightsError(f"torchvision:{name}: {_hint(enum)}")
    file, resize_size = members[member]
    return Published(
        url=BASE + file,
        sha256=file.removesuffix(".pth").rpartition("-")[2],
        preprocessing=Preprocessing(image_size=224, resize_size=resize_size),
    )


def _hint(enum: str) -> str:
    # `resnet50`, `ResNet50` and `resnet50_weights` all mean the same enum.
    bare = {known.lower().removesuffix("_weights"): known for known in _TABLE}
    wanted = enum.lower().removesuffix("_weights")
    near = [wanted] if wanted in bare else difflib.get_close_matches(wanted, bare, n=2)
    if not near:
        return f"no such weights. Those of torchvision known here: {', '.join(_TABLE)}."
    choices = [f"torchvision:{bare[n]}.{member}" for n in near for member in _TABLE[bare[n]]]
    return f"no such weights. Did you mean {' or '.join(choices)}?"
