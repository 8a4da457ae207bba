"""The same recipe here and as a plain PyTorch script: accuracies over seeds, side by side.

    python scripts/compare_pytorch.py data/hymenoptera resnet50.safetensors --out runs/compared

Runs three recipes of `configs/` with a ResNet-50, from the same weights, on the same images, each
for a few epochs: the seed's and both of PyTorch's transfer-learning tutorial. The PyTorch half is
written as the tutorial is: `ImageFolder`, `DataLoader`, `train_model`. Each row is written as soon
as it is there; called again, the script goes on with those that are missing. Needs torch and
torchvision.
"""

import argparse
import copy
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="a folder with train/<class> and val/<class>")
    parser.add_argument("weights", type=Path, help="of a ResNet-50, with torch's names")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="of each stage")
    parser.add_argument("--image-size", type=int, default=224, help="in pixels")
    parser.add_argument("--stride-in-1x1", action="store_true", help="the weights want it")
    return parser


if __name__ == "__main__":
    parser().parse_args()  # a mistake, or --help, needs no torch

import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim import SGD, Optimizer, lr_scheduler
from torchvision import datasets, models, transforms

from jaxft import Recipe, command_line, finetune, recipe_file
from jaxft.report.console import Console

CONFIGS = Path(__file__).parents[1] / "configs"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def views(size: int) -> dict[str, transforms.Compose]:
    normalized = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    centre = [transforms.Resize(size * 256 // 224), transforms.CenterCrop(size)]
    return {
        "train": transforms.Compose([*crop, *normalized]),
        "val": transforms.Compose([*centre, *normalized]),
    }


def pytorch(name: str, args: argparse.Namespace, seed: int, batch_size: int) -> float:
    """The best accuracy of the last stage, by PyTorch."""
    torch.manual_seed(seed)
    images = {
        part: datasets.ImageFolder(args.data / part, view)
        for part, view in views(args.image_size).items()
    }
    loaders = {
        # No workers: they would fork, which JAX, in this same process, does not survive.
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
    optimizer = SGD(model.parameters(), lr=0.001, momentum=0.9)
    yield optimizer, lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)


def tutorial_extractor(model: nn.Module) -> Stages:
    freeze(model, "fc")
    optimizer = SGD(model.fc.parameters(), lr=0.001, momentum=0.9)
    yield optimizer, lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)


def seed_recipe(model: nn.Module) -> Stages:
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


def freeze(model: nn.Module, *but: str) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.startswith(but)


def train_model(
    model: nn.Module,
    loaders: dict[str, torch.utils.data.DataLoader],
    optimizer: Optimizer,
    scheduler: lr_scheduler.LRScheduler | None,
    epochs: int,
) -> float:
    """Leaves the model with the weights of its best epoch, of which it returns the accuracy."""
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
    for layer in (model.layer2, model.layer3, model.layer4):
        layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)


def ours(name: str, args: argparse.Namespace, seed: int, recipe: Recipe) -> float:
    """The same by jaxft."""
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


def main(given: list[str]) -> None:
    args = parser().parse_args(given)
    command_line.check_folder(args.out)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = args.out / "accuracies.jsonl"
    rows.touch()
    known = [json.loads(line) for line in rows.read_text().splitlines()]
    found = {(row["recipe"], row["by"], row["seed"]): row["accuracy"] for row in known}
    for name in RECIPES:
        written = recipe_file.read(CONFIGS / f"{name}.py")
        for seed in range(args.seeds):
            runs = {
                "PyTorch": lambda: pytorch(name, args, seed, written.batch_size),  # noqa: B023
                "jaxft": lambda: ours(name, args, seed, written),  # noqa: B023
            }
            for by, run in runs.items():
                if (name, by, seed) in found:
                    continue
                began = time.perf_counter()
                found[name, by, seed] = accuracy = run()
                row = {"recipe": name, "by": by, "seed": seed, "accuracy": accuracy}
                row["seconds"] = round(time.perf_counter() - began, 1)
                with rows.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    print("\n| recipe | PyTorch | jaxft |\n|---|---|---|")
    for name in RECIPES:
        cells = [
            spread([found[name, by, seed] for seed in range(args.seeds)])
            for by in ("PyTorch", "jaxft")
        ]
        print(f"| `{name}` | {' | '.join(cells)} |")


def spread(accuracies: list[float]) -> str:
    low, high = min(accuracies), max(accuracies)
    return f"{statistics.mean(accuracies):.3f} ({low:.3f}-{high:.3f})"


if __name__ == "__main__":
    command_line.run(main)
