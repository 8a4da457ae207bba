"""Compares accuracies of recipes in jaxft and in plain PyTorch, over seeds.

    python scripts/compare_pytorch.py data/hymenoptera resnet50.safetensors --out runs/compared

Runs three recipes of `configs/` for a few epochs with a ResNet-50: the seed's and both recipes of
PyTorch's transfer-learning tutorial. Both sides use the same weights and images. The PyTorch side
follows the tutorial: `ImageFolder`, `DataLoader`, `train_model`. Each result is written when it is
known; the same command runs only the missing ones. Needs torch and torchvision.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with train/<class> and val/<class>")
    parser.add_argument("weights", type=Path, help="torch-named file of a ResNet-50")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each stage")
    parser.add_argument("--image-size", type=int, default=224, help="in pixels")
    parser.add_argument("--stride-in-1x1", action="store_true", help="the weights need it")
    return parser


if __name__ == "__main__":
    parser().parse_args()  # --help and wrong options need no torch

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torchvision import datasets, models, transforms

from jaxft import Recipe, finetune, recipe_file
from jaxft.cli.command_setup import check_writable, run_until_signal
from jaxft.cli.process import exit_process
from jaxft.report.console import Console

CONFIGS = Path(__file__).parents[1] / "configs"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def transforms_by_split(size: int) -> dict[str, transforms.Compose]:
    """Returns the tutorial's transforms for images of `size` pixels."""
    normalized = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
    return {
        "train": transforms.Compose([*crop, *normalized]),
        "val": transforms.Compose([*centre, *normalized]),
    }


def pytorch(name: str, args: argparse.Namespace, seed: int, batch_size: int) -> float:
    """Trains in PyTorch; returns the best accuracy of the last stage."""
    torch.manual_seed(seed)
    images = {
        part: datasets.ImageFolder(args.data / part, view)
        for part, view in transforms_by_split(args.image_size).items()
    }
    loaders = {
        # No workers: JAX, in the same process, does not survive their fork.
        part: torch.utils.data.DataLoader(images[part], batch_size, shuffle=part == "train")
        for part in images
    }
    model = models.resnet50()
    if args.stride_in_1x1:
        move_strides(model)
    model.load_state_dict(load_file(args.weights))
    model.fc = nn.Linear(model.fc.in_features, len(images["train"].classes))
    for optimizer, scheduler in RECIPES[name](model):
        accuracy = train_model(model, loaders, optimizer, scheduler, args.epochs)
    return accuracy


Stages = Iterator[tuple[Optimizer, lr_scheduler.LRScheduler | None]]


def tutorial_finetune(model: nn.Module) -> Stages:
    """Yields the stage of the tutorial that trains everything."""
    optimizer = SGD(model.parameters(), lr=0.001, momentum=0.9)
    yield optimizer, lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)


def tutorial_extractor(model: nn.Module) -> Stages:
    """Yields the stage of the tutorial that trains the head only."""
    freeze(model, "fc")
    optimizer = SGD(model.fc.parameters(), lr=0.001, momentum=0.9)
    yield optimizer, lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)


def seed_recipe(model: nn.Module) -> Stages:
    """Yields the three stages of the seed."""
    freeze(model, "fc")
    yield SGD(model.fc.parameters(), lr=1e-3, momentum=0.9), None
    freeze(model, "fc", "layer4")
    head = {"params": model.fc.parameters(), "lr": 1e-3}
    late = {"params": model.layer4.parameters(), "lr": 1e-4}
    yield SGD([head, late], momentum=0.9), None
    freeze(model, "")
    head = {"params": model.fc.parameters(), "lr": 1e-3}
    late = {"params": model.layer4.parameters(), "lr": 1e-4}
    rest = [p for n, p in model.named_parameters() if not n.startswith(("fc.", "layer4."))]
    yield SGD([head, late, {"params": rest, "lr": 1e-5}], momentum=0.9), None


RECIPES: dict[str, Callable[[nn.Module], Stages]] = {
    "pytorch_tutorial_extractor": tutorial_extractor,
    "seed": seed_recipe,
    "pytorch_tutorial_finetune": tutorial_finetune,
}


def freeze(model: nn.Module, *trainable: str) -> None:
    """Freezes all parameters except those with one of these prefixes."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(trainable)


def train_model(
    model: nn.Module,
    loaders: dict[str, torch.utils.data.DataLoader],
    optimizer: Optimizer,
    scheduler: lr_scheduler.LRScheduler | None,
    epochs: int,
) -> float:
    """Trains the model, restores its best epoch, and returns that epoch's accuracy."""
    criterion, best, best_weights = nn.CrossEntropyLoss(), 0.0, model.state_dict()
    for _ in range(epochs):
        model.train()
        for inputs, labels in loaders["train"]:
            optimizer.zero_grad()
            criterion(model(inputs), labels).backward()
            optimizer.step()
        if scheduler:
            scheduler.step()
        model.eval()
        with torch.no_grad():
            hits = sum((model(x).argmax(1) == y).sum().item() for x, y in loaders["val"])
        accuracy = hits / len(loaders["val"].dataset)  # type: ignore[arg-type]
        if accuracy > best:
            best, best_weights = accuracy, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_weights)
    return best


def move_strides(model: models.ResNet) -> None:
    """Moves the strides of each layer to its first 1x1 convolution."""
    for layer in (model.layer2, model.layer3, model.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)


def ours(name: str, args: argparse.Namespace, seed: int, recipe: Recipe) -> float:
    """Trains in jaxft; returns the best accuracy of the last stage."""
    recipe = dataclasses.replace(
        recipe,
        model="resnet50",
        stride_in_1x1=args.stride_in_1x1,
        weights=str(args.weights),
        data=f"folder:{args.data}",
        seed=seed,
        image_size=args.image_size,
        resize_size=args.image_size * 256 // 224,
        stages=tuple(dataclasses.replace(s, epochs=args.epochs) for s in recipe.stages),
    )
    return finetune(recipe, args.out / f"{name}_{seed}", console=Console(quiet=True)).score.accuracy


def main(arguments: list[str]) -> None:
    args = parser().parse_args(arguments)
    check_writable(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = args.out / "accuracies.jsonl"
    rows.touch()
    earlier = [json.loads(line) for line in rows.read_text().splitlines()]
    accuracies = {(row["recipe"], row["by"], row["seed"]): row["accuracy"] for row in earlier}
    for name in RECIPES:
        written = recipe_file.read(CONFIGS / f"{name}.py")
        for seed in range(args.seeds):
            runs = {
                "PyTorch": lambda: pytorch(name, args, seed, written.batch_size),  # noqa: B023
                "jaxft": lambda: ours(name, args, seed, written),  # noqa: B023
            }
            for by, run in runs.items():
                if (name, by, seed) in accuracies:
                    continue
                start = time.perf_counter()
                accuracies[name, by, seed] = accuracy = run()
                row = {"recipe": name, "by": by, "seed": seed, "accuracy": accuracy}
                row["seconds"] = round(time.perf_counter() - start, 1)
                with rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    print("\n| recipe | PyTorch | jaxft |\n|---|---|---|")
    for name in RECIPES:
        cells = [
            spread([accuracies[name, by, seed] for seed in range(args.seeds)])
            for by in ("PyTorch", "jaxft")
        ]
        print(f"| `{name}` | {' | '.join(cells)} |")


def spread(accuracies: list[float]) -> str:
    """Returns the mean and the range as text."""
    low, high = min(accuracies), max(accuracies)
    return f"{statistics.mean(accuracies):.3f} ({low:.3f}-{high:.3f})"


if __name__ == "__main__":
    exit_process(run_until_signal(lambda: main(sys.argv[1:])))
