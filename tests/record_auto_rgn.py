"""Records epochs of Auto-RGN in torch for tests/train/test_auto_rgn.py.

    python tests/record_auto_rgn.py

Needs torch; recorded with torch 2.13.0, in float64. The loop is that of Lee et al. 2022: before
each epoch the relative gradient norms of all tensors without "bn" in their names, averaged over
five batches, weigh the rates of a new Adam. Ours measures the first five of the epoch's batches,
where theirs draws five of another order.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch.nn.functional import cross_entropy

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "train")]

from float64_stages import samples  # noqa: E402
from record_ddp import network  # noqa: E402
from record_stage_steps import tensors  # noqa: E402
from test_auto_rgn import BATCH, EPOCHS, GAMMA, GOLDEN, RATES, SOURCE  # noqa: E402
from test_ddp import normalized  # noqa: E402

from jaxft.data import BatchConfig, Preprocessing, train_batches  # noqa: E402


def epochs():
    """Each epoch's batches, in the order that ours has."""
    batches = train_batches(
        SOURCE,
        BatchConfig(
            preprocessing=Preprocessing(image_size=16, resize_size=16),
            augment="none",
            batch_size=BATCH,
            seed=0,
            stage=0,
        ),
        epochs=EPOCHS,
    )
    pairs = [
        (
            torch.from_numpy(normalized(image[mask]).transpose(0, 3, 1, 2)).double(),
            torch.from_numpy(target[mask]).long(),
        )
        for image, target, mask in batches
    ]
    size = len(pairs) // EPOCHS
    return [pairs[i : i + size] for i in range(0, len(pairs), size)]


def record():
    """The network's tensors at the end."""
    module = network().eval()
    trained = {name: p for name, p in module.named_parameters() if "bn" not in name}
    for epoch, batches in enumerate(epochs()):
        ratios = {name: [] for name in trained}
        for images, target in batches[:5]:
            loss = cross_entropy(module(images), target)
            found = torch.autograd.grad(loss, list(trained.values()))
            for (name, p), gradient in zip(trained.items(), found, strict=True):
                ratios[name].append((gradient.norm() / p.norm()).item())
        ratios = {name: np.mean(values) for name, values in ratios.items()}
        largest = max(ratios.values())
        groups = [
            {"params": [p], "lr": base(name) * GAMMA**epoch * ratios[name] / largest}
            for name, p in trained.items()
        ]
        optimizer = torch.optim.Adam(groups, weight_decay=1e-4)
        for images, target in batches:
            optimizer.zero_grad()
            cross_entropy(module(images), target).backward()
            optimizer.step()
    return {"end": samples(tensors(module))}


def base(name):
    """The rate of a tensor's group."""
    return RATES["**.kernel" if name.endswith("weight") else "fc"]


if __name__ == "__main__":
    np.savez_compressed(GOLDEN, **record())
    print(GOLDEN.name, f"{GOLDEN.stat().st_size >> 10} KiB")
