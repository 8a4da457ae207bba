"""Trains the seed's three stages in plain PyTorch, for comparison in `scripts/benchmark.py`.

    python scripts/plain_pytorch.py data/hymenoptera resnet50.safetensors --stride-in-1x1

Trains the head, then layer4 with it, then everything, each with a new SGD and without augmentation;
frozen layers use running statistics. Prints the seconds of each stage and the accuracy as JSON.
Needs torch and torchvision.
"""

import argparse
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

RATES = {
    "head": {"fc": 1e-3},
    "late": {"fc": 1e-3, "layer4": 1e-4},
    "all": {"fc": 1e-3, "layer4": 1e-4, "*": 1e-5},
}


def parser(description: str) -> argparse.ArgumentParser:
    """Returns a parser with the options that both scripts share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with train/<class> and val/<class>")
    parser.add_argument("weights", type=Path, help="torch-named file of the network")
    parser.add_argument("--model", default="resnet50")
    parser.add_argument("--stride-in-1x1", action="store_true", help="the weights need it")
    parser.add_argument("--image-size", type=int, default=224, help="in pixels")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, nargs=3, default=[5, 5, 2], help="of each stage")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="gpu: in bfloat16")
    return parser


def network(model: str, stride_in_1x1: bool) -> Any:
    """Returns torchvision's network of this name."""
    from torchvision import models

    module = models.get_model(model)
    if stride_in_1x1:
        for layer in (module.layer2, module.layer3, module.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    return module


def begin(module: Any, stage: str) -> Any:
    """Freezes the layers that the stage does not train; returns the optimizer of the others."""
    import torch

    module.requires_grad_(False)
    groups: list[dict[str, Any]] = []
    for name, rate in RATES[stage].items():
        grouped = {id(p) for group in groups for p in group["params"]}
        part = module if name == "*" else getattr(module, name)
        params = [p for p in part.parameters() if id(p) not in grouped]
        groups.append({"params": params, "lr": rate})
        part.requires_grad_(True)
    set_to_train(module)
    return torch.optim.SGD(groups, momentum=0.9)


def set_to_train(module: Any) -> None:
    """Switches to training mode, except for frozen norm layers."""
    import torch

    module.train()
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d) and not layer.weight.requires_grad:
            layer.eval()


def loaders(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the DataLoaders of `train` and `val`."""
    import torch
    from torchvision import datasets, transforms

    view = transforms.Compose(
        [
            transforms.Resize(args.image_size * 256 // 224),
            transforms.CenterCrop(args.image_size),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    return {
        half: torch.utils.data.DataLoader(
            datasets.ImageFolder(args.data / half, view),
            args.batch_size,
            shuffle=half == "train",
            num_workers=2,
        )
        for half in ("train", "val")
    }


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Trains all stages; returns their seconds, the last accuracy and the peak memory."""
    import torch
    from safetensors.torch import load_file
    from torch.nn.functional import cross_entropy

    torch.manual_seed(0)
    device = "cuda" if args.device == "gpu" else "cpu"
    times, batches = [time.perf_counter()], loaders(args)
    module = network(args.model, args.stride_in_1x1)
    module.load_state_dict(load_file(args.weights))
    module.fc = torch.nn.Linear(module.fc.in_features, len(batches["train"].dataset.classes))
    module.to(device, memory_format=torch.channels_last)

    def logits(inputs: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=args.device == "gpu"):
            return module(inputs.to(device, memory_format=torch.channels_last))

    for stage, epochs in zip(RATES, args.epochs, strict=True):
        optimizer = begin(module, stage)
        for _ in range(epochs):
            set_to_train(module)
            for inputs, labels in batches["train"]:
                optimizer.zero_grad()
                cross_entropy(logits(inputs), labels.to(device)).backward()
                optimizer.step()
            module.eval()
            with torch.no_grad():
                hits = sum((logits(x).argmax(1).cpu() == y).sum().item() for x, y in batches["val"])
        times.append(time.perf_counter())
    seconds = [end - start for start, end in pairwise(times)]
    accuracy = hits / len(batches["val"].dataset)
    return {"seconds": seconds, "accuracy": accuracy, "peak_mib": peak_mib()}


def peak_mib() -> float:
    """Returns the peak resident memory of this process, on Linux."""
    # Not getrusage: its peak includes the memory of the parent at the fork.
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in x)
    return int(line.split()[1]) / 2**10


def main(arguments: Sequence[str] | None = None) -> None:
    print(json.dumps(train(parser(__doc__).parse_args(arguments))))


if __name__ == "__main__":
    main()
