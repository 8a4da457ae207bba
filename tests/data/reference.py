"""What the tests of images share: an image, its digest, and torchvision where it is installed."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden"  # transforms*.npz are by record_transforms.py
HYMENOPTERA = Path(__file__).parents[2].parent / "shared/data/hymenoptera"


def sample(height: int, width: int) -> Image.Image:
    """A gradient with noise, in integer arithmetic so that it is the same everywhere."""
    y, x, c = np.ogrid[:height, :width, :3]
    noise = ((y * 7919) ^ (x * 104729) ^ (c * 1299709)) % 64
    return Image.fromarray((128 * y // height + 63 * x // width + noise).astype(np.uint8))


def digest(*images) -> str:
    sha = hashlib.sha256()
    for image in images:
        pixels = np.asarray(image)
        sha.update(repr(pixels.shape).encode() + pixels.tobytes())
    return sha.hexdigest()


def recorded(name: str) -> dict[str, str]:
    """The digests of a golden file by the names of their cases."""
    with np.load(GOLDEN / name) as golden:
        return dict(zip(golden["names"].tolist(), golden["digests"].tolist(), strict=True))


def torchvision_transforms():
    torch = pytest.importorskip("torch")
    try:
        return pytest.importorskip("torchvision.transforms")
    except RuntimeError:
        # Beside a CPU build of torch, the operators of torchvision's extension are missing, and
        # it refuses to load until somebody declares them. No transform uses them.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
        from torchvision import transforms as module

        module.library = library  # what it declared ends with it
        return module
