"""Records outputs, gradients and training steps of timm's networks, for test_timm.py.

    python tests/models/record_timm.py [CASE ...]

Needs torch and timm. Both sides draw weights and images from seeds, see record_golden.py, so the
files in tests/golden/timm hold names, shapes, outputs and digests only.
"""

import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import record_golden
from timm_cases import CASES, Case

GOLDEN = Path(__file__).parents[1] / "golden" / "timm"
NUM_CLASSES = 10
LR = 0.01
STEPS = 3
TARGETS = np.array([3, 1])
Arrays = dict[str, np.ndarray]


def timm_is_here() -> bool:
    """Whether the packages that `record` needs are installed."""
    return all(map(importlib.util.find_spec, ("torch", "timm")))


def digest(tensors: Mapping[str, np.ndarray]) -> np.ndarray:
    """L1 norm and a projection of each tensor [n 2], in the order of the names."""
    return np.array([[np.abs(x).sum(), x.ravel() @ signs(n, x.size)] for n, x in in_order(tensors)])


def in_order(tensors: Mapping[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
    """Returns the tensors in float64, sorted by name."""
    return [(name, np.asarray(tensors[name], np.float64)) for name in sorted(tensors)]


def signs(name: str, size: int) -> np.ndarray:
    """Signs that depend on the name alone."""
    return np.sign(record_golden.weights({f"{name} signs": (size,)})[f"{name} signs"])


def build(case: Case, side: int, dtype=None):
    """Builds the network in torch with seeded weights, for images of a size."""
    import torch

    record_golden.import_torchvision()  # timm needs it
    import timm

    def create(side):
        sized = {"img_size": side} if case.is_sized else {}
        return timm.create_model(case.name, num_classes=NUM_CLASSES, **sized, **case.timm_options)

    module = create(case.sides[0])
    shapes = {n: tuple(x.shape) for n, x in module.state_dict().items() if is_weight(n)}
    state = {n: torch.from_numpy(x) for n, x in record_golden.weights(shapes).items()}
    module.load_state_dict(state, strict=False)
    if side != case.sides[0]:
        resized = create(side)
        convert = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
        resized.load_state_dict(convert(state, resized) if convert else state, strict=False)
        module = resized
    return module.to(dtype or torch.float64)


def is_weight(name: str) -> bool:
    """Whether a tensor of a state dict is more than a counter."""
    return not name.endswith("num_batches_tracked")


def record(case: Case) -> Arrays:
    """Computes a case in torch, in float64."""
    import torch

    result: Arrays = {}
    for side in case.sides:
        module = build(case, side).eval()
        with torch.no_grad():
            batch = torch.from_numpy(record_golden.images(side)).double()
            result[f"logits_{side}"] = module(batch).numpy()
    module = build(case, case.sides[0])
    listing = {n: tuple(x.shape) for n, x in module.state_dict().items() if is_weight(n)}
    result["tensors"] = np.array(record_golden.listing(listing).encode())
    if case.train_side is None:
        return result
    module = build(case, case.train_side).train()
    optimizer = torch.optim.SGD(module.parameters(), LR, momentum=0.9)
    batch = torch.from_numpy(record_golden.images(case.train_side)).double()
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(module(batch), torch.from_numpy(TARGETS))
        loss.backward()
        if step == 0:
            result["gradients"] = digest({n: p.grad.numpy() for n, p in module.named_parameters()})
        optimizer.step()
        losses.append(loss.item())
    state = {n: x.detach().numpy() for n, x in module.state_dict().items() if is_weight(n)}
    return result | {"losses": np.array(losses), "trained": digest(state)}


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or CASES:
        arrays = record(CASES[name])
        np.savez_compressed(GOLDEN / f"{name}.npz", **arrays)
        print(
            name, arrays.get("losses"), f"std {arrays[f'logits_{CASES[name].sides[0]}'].std():.3g}"
        )
