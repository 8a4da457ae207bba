"""Shared by the image tests: a sample image, digests, golden files, and torchvision."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

GOLDEN = Path(__file__).parents[1] / "golden"  # record_transforms.py writes transforms*.npz
HYMENOPTERA = Path(__file__).parents[2].parent / "shared/data/hymenoptera"


def sample(height: int, width: int) -> Image.Image:
    """Returns a gradient with noise, in integer arithmetic, so that all platforms agree."""
    y, x, c = np.ogrid[:height, :width, :3]
    noise = ((y * 7919) ^ (x * 104729) ^ (c * 1299709)) % 64
    return Image.fromarray((128 * y // height + 63 * x // width + noise).astype(np.uint8))


def digest(*images) -> str:
    """Returns a hex digest of the images' shapes and pixels."""
    sha = hashlib.sha256()
    for image in images:
        pixels = np.asarray(image)
        sha.update(repr(pixels.shape).encode() + pixels.tobytes())
    return sha.hexdigest()


def recorded(name: str) -> dict[str, str]:
    """Returns the digests of a golden file by case."""
    with np.load(GOLDEN / name) as golden:
        return dict(zip(golden["names"].tolist(), golden["digests"].tolist(), strict=True))


def torchvision_transforms():
    """Returns `torchvision.transforms`; skips the test if it is not installed."""
    torch = pytest.importorskip("torch")
    try:
        return pytest.importorskip("torchvision.transforms")
    except RuntimeError:
        # With a CPU build of torch, torchvision's import fails because operators of its extension
        # are missing. Declaring them is enough, as no transform uses them.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
        from torchvision import transforms as module

        module.library = library  # keeps the declarations alive
        return module
