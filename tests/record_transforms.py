"""Records torchvision's outputs for tests/data/test_transforms.py.

    python tests/record_transforms.py

Needs torch and torchvision; recorded with torchvision 0.28.0 and Pillow 13.
"""

import sys
from importlib import import_module
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent / "data"))


def main() -> None:
    tests = import_module("test_transforms")
    transforms = tests.torchvision_transforms()
    normalize = transforms.Compose(
        [
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    np.savez_compressed(
        tests.GOLDEN,
        names=list(tests.CASES),
        digests=[tests.digest(tests.torchvisions(*case)) for case in tests.CASES.values()],
        normalized=normalize(tests.LEVELS).permute(1, 2, 0).numpy(),
    )


if __name__ == "__main__":
    main()
