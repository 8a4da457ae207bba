"""Records tensor names, shapes and logits of transformers' ResNets.

    python tests/weights/record_transformers.py

Needs torch, torchvision and transformers; recorded with transformers 5.24.
"""

import importlib
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import record_golden

# Configurations of microsoft/resnet-18 and microsoft/resnet-50.
NETWORKS = {
    "resnet18": {
        "layer_type": "basic",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
    },
    "resnet50": {
        "layer_type": "bottleneck",
        "depths": [3, 4, 6, 3],
        "hidden_sizes": [256, 512, 1024, 2048],
    },
}


def main() -> None:
    torch = importlib.import_module("torch")
    record_golden.import_torchvision()
    transformers = importlib.import_module("transformers")
    for name, config in NETWORKS.items():
        module = transformers.ResNetForImageClassification(
            transformers.ResNetConfig(**config, num_labels=record_golden.NUM_CLASSES)
        )
        shapes = {
            n: tuple(t.shape) for n, t in module.state_dict().items() if t.is_floating_point()
        }
        state = {n: torch.from_numpy(x) for n, x in record_golden.weights(shapes).items()}
        module.load_state_dict(state, strict=False)
        with torch.no_grad():
            logits = module.eval()(torch.from_numpy(record_golden.images(65))).logits.numpy()
        np.savez_compressed(
            record_golden.GOLDEN / f"transformers_{name}.npz",
            names=list(shapes),
            shapes=[" ".join(map(str, shape)) for shape in shapes.values()],
            logits=logits,
        )
        print(name, len(shapes), f"std {logits.std():.3g}")


if __name__ == "__main__":
    main()
