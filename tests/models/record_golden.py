"""Records tensors and outputs of PyTorch's networks with random weights, for test_resnet.py.

    python tests/models/record_golden.py

Needs torch, torchvision and timm. Both sides draw weights and images from seeds (`weights`,
`images`), so the files in tests/golden hold names, shapes and outputs only.
"""

import importlib
import importlib.util
import sys
import zlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parents[1] / "golden"
TENSORS = GOLDEN / "resnet_tensors.npz"
NUM_CLASSES = 10
_TORCHVISION = (
    *(f"resnet{depth}" for depth in (18, 34, 50, 101, 152)),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d"),
    *("wide_resnet50_2", "wide_resnet101_2"),
)
_TIMM = (
    *(f"resnet{depth}" for depth in (26, 200)),
    *(f"resnet{depth}{letter}" for depth in (50, 101, 152) for letter in "cs"),
    *(f"resnet{depth}d" for depth in (18, 26, 34, 50, 101, 152, 200)),
    *(f"resnet{depth}t" for depth in (10, 14, 26, 50)),
    *("resnext50d_32x4d", *(f"resnext101_32x{width}d" for width in (4, 16, 32))),
)
_CIFAR = tuple(f"cifar_resnet{depth}" for depth in (8, 20, 32, 44, 56, 110))
# case: (name of the network, options of `create`)
CASES = {
    **{name: (name, {}) for name in (*_TORCHVISION, *_TIMM, *_CIFAR)},
    **{
        f"{name}_stride_in_1x1": (name, {"stride_in_1x1": True})
        for name in ("resnet50", "resnet101", "resnet152")
    },
    "resnet18_concat_pool": ("resnet18", {"concat_pool": True}),
}
COMPARED = {
    "resnet18": (64, 224),
    "resnet50": (64,),
    "resnet101": (),  # more than ten blocks in a layer
    "resnet50_stride_in_1x1": (64,),
    "resnet18_concat_pool": (64,),
    "resnext50_32x4d": (64,),
    "wide_resnet50_2": (),
    "resnet50c": (),
    "resnet50s": (),
    "resnet18d": (64,),
    "resnet50d": (64,),
    "resnet10t": (),
    "resnet26t": (64,),
    "cifar_resnet8": (32,),
    "cifar_resnet20": (32,),
}
"""Cases whose outputs are recorded, with the sizes of images in eval mode: even, and full size.
Each case also takes a training step, on images of an odd size.

They cover every kind of stem, block, shortcut and head. The other networks differ from them in
depths and widths alone."""


def originals_are_here() -> bool:
    """Whether the packages that `record` needs are installed."""
    return all(map(importlib.util.find_spec, ("torch", "torchvision", "timm")))


def train_side(case: str) -> int:
    """Image size of the training step, odd in each layer.

    Not smaller: XLA on CPU takes 50 times as long for a float64 convolution at 2x2 px.
    """
    return 17 if case in _CIFAR else 65


def images(side: int, batch: int = 2) -> np.ndarray:
    """Normalised random images `[b c h w]`."""
    return np.random.default_rng(side).standard_normal((batch, 3, side, side), np.float32)


def weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Random tensors for a torch state dict; each depends on its name and shape alone."""
    return {name: _weight(name, shape) for name, shape in shapes.items()}


@cache
def _pool() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(2**20, np.float32)


def _weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    # The numbers repeat a pool, because drawing a hundred million of them would take longer than
    # all other work.
    start = zlib.crc32(name.encode()) % 2**19
    normal = np.resize(_pool()[start:], shape)
    uniform = 1 + normal.clip(-2, 2) / 4  # between a half and one and a half
    if len(shape) > 1:
        return normal * np.float32(np.sqrt(2 / np.prod(shape[1:])))
    if name.endswith("running_var"):
        return uniform
    if name.endswith(".weight"):
        # Small at the end of a residual branch, so that depth does not inflate the signal.
        return uniform * np.float32(0.3 if name.endswith("bn3.weight") else 0.7)
    return normal * np.float32(0.1)


def digest(logits: np.ndarray, running: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The logits of a training step, and L1 norm and a projection of each running statistic."""
    vectors = [running[name].astype(np.float64) for name in sorted(running)]
    sizes = np.array([np.abs(vector).sum() for vector in vectors])
    signs = [np.sign(np.resize(_pool(), vector.shape)) for vector in vectors]
    directions = np.array([x @ s for x, s in zip(vectors, signs, strict=True)]) / sizes
    return {"train": logits, "sizes": sizes, "directions": directions}


def shapes(case: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of torch's tensors by name, without counters of batches."""
    return {
        name: tuple(tensor.shape)
        for name, tensor in _on_meta(case).state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def listing(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns names and shapes as text, a sorted line for each tensor."""
    return "\n".join(f"{name} {list(shape)}" for name, shape in sorted(shapes.items()))


def _on_meta(case: str):
    """Builds a case in torch without memory or initial values."""
    import torch

    network, options = CASES[case]
    with torch.device("meta"):
        return torch_network(network, **options)


def record(case: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Computes a case in torch.

    Returns the logits in eval mode by image size and of a training step, and the running statistics
    after the step by name. The step is in float64: in a hundred norm layers with few values each,
    float32 rounding errors grow to 1e-4 in torch as well as in jaxft.
    """
    import torch

    module = _on_meta(case)
    state = {name: torch.from_numpy(x) for name, x in weights(shapes(case)).items()}
    counters = module.state_dict().keys() - state.keys()
    module.load_state_dict(state | {n: torch.tensor(0) for n in counters}, assign=True)
    outputs = {}
    with torch.no_grad():
        module.eval()
        for side in COMPARED[case]:
            outputs[f"eval_{side}"] = module(torch.from_numpy(images(side))).numpy()
        module.double().train()
        batch = torch.from_numpy(images(train_side(case), batch=4)).double()
        outputs["train"] = module(batch).numpy()
    return outputs, {n: t.numpy() for n, t in module.state_dict().items() if ".running_" in n}


def torch_network(name: str, stride_in_1x1: bool = False, concat_pool: bool = False):
    """Builds the network in torch, with `NUM_CLASSES` classes."""
    if name in _CIFAR:
        return _cifar_resnet((int(name.removeprefix("cifar_resnet")) - 2) // 6)
    torchvision = import_torchvision()
    if name in _TIMM:
        return importlib.import_module("timm").create_model(name, num_classes=NUM_CLASSES)
    module = torchvision.models.get_model(name, num_classes=NUM_CLASSES)
    if stride_in_1x1:
        for part in module.modules():
            if isinstance(part, torchvision.models.resnet.Bottleneck) and part.stride == 2:
                part.conv1.stride, part.conv2.stride = (2, 2), (1, 1)
    if concat_pool:
        _replace_head(module)
    return module


def _replace_head(module) -> None:
    """Sets fastai's `AdaptiveConcatPool2d` and `create_head(2 * 512, n)`, without dropout."""
    import torch
    from torch import nn

    class ConcatPool(nn.Module):
        def forward(self, x):
            return torch.cat([x.amax((2, 3)), x.mean((2, 3))], 1)

    hidden = 512
    module.avgpool = ConcatPool()
    module.fc = nn.Sequential(
        *(nn.BatchNorm1d(2 * 512), nn.Identity(), nn.Linear(2 * 512, hidden, bias=False)),
        *(nn.ReLU(), nn.BatchNorm1d(hidden), nn.Identity()),
        nn.Linear(hidden, NUM_CLASSES, bias=False),
    )


@cache
def import_torchvision():
    """Imports torchvision, even if its compiled operators, unused here, do not load."""
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
    """Builds the network of He et al. 2015, section 4.2, with shortcuts without parameters."""
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
    np.savez_compressed(TENSORS, **{case: listing(shapes(case)).encode() for case in CASES})
    for case in sys.argv[1:] or COMPARED:
        outputs, running = record(case)
        outputs |= digest(outputs["train"], running)
        np.savez_compressed(GOLDEN / f"{case}.npz", **outputs)
        print(case, {name: f"std {array.std():.3g}" for name, array in outputs.items()})
