"""Records tensor names, shapes and logits of transformers' networks.

    python tests/weights/record_transformers.py

Needs torch, torchvision and transformers; recorded with transformers 5.24.
"""

import importlib
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import record_golden

_ATTO = {"depths": [2, 2, 6, 2], "hidden_sizes": [40, 80, 160, 320]}
# name: (class, configuration); those of microsoft/resnet-18, microsoft/resnet-50, a small
# facebook/convnext-tiny-224, and facebook/convnextv2-atto-1k-224.
NETWORKS = {
    "resnet18": (
        "ResNet",
        {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]},
    ),
    "resnet50": (
        "ResNet",
        {
            "layer_type": "bottleneck",
            "depths": [3, 4, 6, 3],
            "hidden_sizes": [256, 512, 1024, 2048],
        },
    ),
    "convnext_atto": ("ConvNext", _ATTO),
    "convnextv2_atto": ("ConvNextV2", _ATTO),
}


# Vision transformers, small: the class, its configuration, and its output.
SMALL = {
    "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56,
    "patch_size": 14, "num_labels": record_golden.NUM_CLASSES,
}  # fmt: skip
TRANSFORMERS = {
    "vit": ("ViTForImageClassification", "ViTConfig", {"intermediate_size": 384}, "logits"),
    "dinov2": ("Dinov2Model", "Dinov2Config", {}, "pooler_output"),
    "dinov2_with_registers": (
        "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {}, "pooler_output",
    ),
}  # fmt: skip


def save(name: str, shapes: dict[str, tuple[int, ...]], outputs: np.ndarray) -> None:
    np.savez_compressed(
        record_golden.GOLDEN / f"transformers_{name}.npz",
        names=list(shapes),
        shapes=[" ".join(map(str, shape)) for shape in shapes.values()],
        logits=outputs,
    )
    print(name, len(shapes), f"std {outputs.std():.3g}")


def record_convolutional(torch, transformers) -> None:
    for name, (family, options) in NETWORKS.items():
        config = getattr(transformers, f"{family}Config")(
            **options, num_labels=record_golden.NUM_CLASSES
        )
        module = getattr(transformers, f"{family}ForImageClassification")(config)
        shapes = {
            n: tuple(t.shape) for n, t in module.state_dict().items() if t.is_floating_point()
        }
        state = {n: torch.from_numpy(x) for n, x in record_golden.weights(shapes).items()}
        module.load_state_dict(state, strict=False)
        with torch.no_grad():
            logits = module.eval()(torch.from_numpy(record_golden.images(65))).logits.numpy()
        save(name, shapes, logits)


def record_transformers(torch, transformers) -> None:
    """Goes through files, because transformers has other names in memory."""
    safetensors = importlib.import_module("safetensors.numpy")
    for name, (kind, config_kind, options, output) in TRANSFORMERS.items():
        config = getattr(transformers, config_kind)(**SMALL | options)
        with tempfile.TemporaryDirectory() as folder:
            file = f"{folder}/model.safetensors"
            getattr(transformers, kind)(config).save_pretrained(folder)
            shapes = {n: x.shape for n, x in safetensors.load_file(file).items()}
            metadata = {"format": "pt"}
            safetensors.save_file(record_golden.weights(shapes), file, metadata)
            module = getattr(transformers, kind).from_pretrained(folder).eval()
        with torch.no_grad():
            outputs = module(torch.from_numpy(record_golden.images(56)))
        save(name, shapes, outputs[output].numpy())


def main() -> None:
    torch = importlib.import_module("torch")
    record_golden.import_torchvision()
    transformers = importlib.import_module("transformers")
    record_convolutional(torch, transformers)
    record_transformers(torch, transformers)


if __name__ == "__main__":
    main()
