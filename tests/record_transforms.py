"""Records torchvision's outputs for the tests of images in tests/data.

    python tests/record_transforms.py

Needs torch, torchvision, and hymenoptera beside the checkout (`reference.HYMENOPTERA`); recorded
with torchvision 0.28.0 and Pillow 13.
"""

import sys
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "data"))


def main() -> None:
    reference = import_module("reference")
    geometry, augment, decode = map(import_module, ("test_geometry", "test_augment", "test_decode"))
    transforms = reference.torchvision_transforms()
    normalize = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    with tempfile.TemporaryDirectory() as folder:
        files = {name: decode.torchvision_views(name, Path(folder)) for name in decode.FILES}
    files["photographs"] = decode.torchvision_photographs()
    images = {
        "transforms": {
            name: [geometry.torchvision_pixels(*case)] for name, case in geometry.CASES.items()
        },
        "transforms_augment": {
            name: function(*case) for name, (_, function, case) in augment.CASES.items()
        },
        "transforms_decode": files,
    }
    more = {"transforms": {"normalized": normalize(geometry.LEVELS).permute(1, 2, 0).numpy()}}
    for name, cases in images.items():
        np.savez_compressed(
            reference.GOLDEN / f"{name}.npz",
            names=list(cases),
            digests=[reference.digest(*made) for made in cases.values()],
            **more.get(name, {}),
        )


if __name__ == "__main__":
    main()
