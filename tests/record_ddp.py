"""Records four steps of torch's DistributedDataParallel, for tests/train/test_ddp.py.

    python tests/record_ddp.py

Needs torch; recorded with torch 2.13.0 on two processes (gloo), in float64. Each rank has half of
the batch, its own batch statistics (no SyncBatchNorm) and buffers that begin as rank 0's.
"""

import os
import socket
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import torch.multiprocessing
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS / "models"), str(TESTS / "train")]

from drawn import weight  # noqa: E402
from record_golden import torch_network  # noqa: E402
from test_ddp import GOLDEN, RATE, STEPS, batch, normalized, sample  # noqa: E402

RANKS = 2


def network():
    """The CIFAR ResNet-8 with the test's weights, float64."""
    module = torch_network("cifar_resnet8").double()
    for name, tensor in module.state_dict().items():
        if tensor.ndim:  # num_batches_tracked has no dimension
            tensor.copy_(torch.from_numpy(weight(name, tuple(tensor.shape))))
    return module


def train(rank, port, folder):
    """One rank: writes the loss of its half at each step and, at the end, its network."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=RANKS)
    module = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9)
    losses = []
    for step in range(STEPS):
        image, target, _ = batch(step)
        mine = np.split(np.arange(len(target)), RANKS)[rank]
        images = torch.from_numpy(normalized(image)[mine].transpose(0, 3, 1, 2)).double()
        loss = cross_entropy(module(images), torch.from_numpy(target[mine]).long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    state = {name: x.numpy() for name, x in module.module.state_dict().items() if x.ndim}
    np.savez(Path(folder) / f"{rank}.npz", losses=losses, **state)
    torch.distributed.destroy_process_group()


def record(folder):
    """Samples of rank 0's parameters and buffers by torch's names; the losses' means over ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(train, (port, str(folder)), nprocs=RANKS)
    ranks = [dict(np.load(Path(folder) / f"{rank}.npz")) for rank in range(RANKS)]
    samples = {name: sample(x) for name, x in ranks[0].items()}
    return {**samples, "losses": np.mean([rank["losses"] for rank in ranks], axis=0)}


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        recorded = record(folder)
    np.savez_compressed(GOLDEN, **recorded)
    print("losses", recorded["losses"], f"{GOLDEN.stat().st_size >> 10} KiB")
