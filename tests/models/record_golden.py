"""Records what PyTorch computes with random weights, for test_resnet.py to hold us to.

    python tests/models/record_golden.py

Needs torch and torchvision. Weights and images follow from seeds on both sides (`weights`,
`images`), so that the files in tests/golden hold outputs only.
"""

import importlib
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
NUM_CLASSES = 10
# name: (network, stride_in_1x1, image sides, whether a training step is recorded)
CASES = {
    "resnet18": ("resnet18", False, (64, 65), True),
    "resnet50": ("resnet50", False, (64, 65), False),
    "resnet50_stride_in_1x1": ("resnet50", True, (64, 65), False),
    "cifar_resnet20": ("cifar_resnet20", False, (32, 33), True),
}


def images(side: int, batch: int = 2) -> np.ndarray:
    """Random images `[b c h w]`, as if normalised."""
    return np.random.default_rng(side).standard_normal((batch, 3, side, side), np.float32)


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random tensors for a torch state dict, each a function of its name and shape alone."""
    return {name: _weight(name, shape) for name, shape in shapes.items()}


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    if len(shape) > 1:
        drawn = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    elif name.endswith("running_var"):
        drawn = rng.uniform(0.5, 1.5, shape)
    elif name.endswith(".weight"):
        # Small at the end of a residual branch, so that depth does not inflate the signal.
        drawn = rng.uniform(0.5, 1.5, shape) * (0.3 if name.endswith("bn3.weight") else 0.7)
    else:
        drawn = rng.standard_normal(shape) * 0.1
    return drawn.astype(np.float32)


def digest(logits: np.ndarray, running: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A training step's logits and running statistics: one whole layer, and each tensor's sum."""
    names = sorted(running)
    return {
        "train": logits,
        "running_mean": running["layer2.0.bn1.running_mean"],
        "running_var": running["layer2.0.bn1.running_var"],
        "running_sums": np.array([running[name].sum(dtype=np.float64) for name in names]),
    }


def record(name: str) -> dict[str, np.ndarray]:
    """What torch computes for a case: logits in eval mode by image side, and a step's digest."""
    import torch

    network, stride_in_1x1, sides, train = CASES[name]
    module = torch_network(network, stride_in_1x1)
    shapes = {n: tuple(t.shape) for n, t in module.state_dict().items() if t.is_floating_point()}
    state = {n: torch.from_numpy(array) for n, array in weights(shapes).items()}
    module.load_state_dict(state, strict=False)
    recorded = {}
    with torch.no_grad():
        module.eval()
        for side in sides:
            recorded[f"eval_{side}"] = module(torch.from_numpy(images(side))).numpy()
        if train:
            module.train()
            logits = module(torch.from_numpy(images(sides[0], batch=4))).numpy()
            state = {n: t.numpy() for n, t in module.state_dict().items() if ".running_" in n}
            recorded |= digest(logits, state)
    return recorded


def torch_network(name: str, stride_in_1x1: bool):
    """The network in torch, with `NUM_CLASSES` classes."""
    if name.startswith("cifar_resnet"):
        return _cifar_resnet((int(name.removeprefix("cifar_resnet")) - 2) // 6)
    torchvision = import_torchvision()
    module = torchvision.models.get_model(name, num_classes=NUM_CLASSES)
    if stride_in_1x1:
        for part in module.modules():
            if isinstance(part, torchvision.models.resnet.Bottleneck) and part.stride == 2:
                part.conv1.stride, part.conv2.stride = (2, 2), (1, 1)
    return module


@cache
def import_torchvision():
    """torchvision, also where its compiled operators do not load; no classifier needs them."""
    import torch

    try:
        return importlib.import_module("torchvision")
    except RuntimeError:  # "operator torchvision::nms does not exist"
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor a, Tensor b, float c) -> Tensor")
        library.define("qnms(Tensor a, Tensor b, float c) -> Tensor")
        torchvision = importlib.import_module("torchvision")
        torchvision.library = library  # the operators live as long as this object
        return torchvision


def _cifar_resnet(n: int):
    """He et al. 2015, section 4.2, with shortcuts without parameters (option A)."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, c_in: int, c_out: int, stride: int):
            super().__init__()
            self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(c_out)
            self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(c_out)
            self.stride, self.extra = stride, c_out - c_in

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            half = self.extra // 2
            shortcut = x[:, :, :: self.stride, :: self.stride]
            return torch.relu(y + functional.pad(shortcut, (0, 0, 0, 0, half, half)))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            for i, (c_in, c_out) in enumerate(((16, 16), (16, 32), (32, 64))):
                first = Block(c_in, c_out, 2 if i else 1)
                rest = (Block(c_out, c_out, 1) for _ in range(n - 1))
                setattr(self, f"layer{i + 1}", nn.Sequential(first, *rest))
            self.fc = nn.Linear(64, NUM_CLASSES)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            x = self.layer3(self.layer2(self.layer1(x)))
            return self.fc(x.mean((2, 3)))

    return Network()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for case in CASES:
        outputs = record(case)
        np.savez(GOLDEN / f"{case}.npz", **outputs)
        print(case, {name: f"std {array.std():.3g}" for name, array in outputs.items()})
