"""Records a hand-written LoRA training in torch, for tests/test_lora_trajectories.py.

    python tests/record_lora.py

Needs torch; recorded with torch 2.13.0, in float64. The forward pass applies the adapters apart
from the kernels, as PEFT's layers do; the merge is PEFT's `merge_and_unload`.
"""

import jax
import numpy as np
import test_lora_trajectories as tests
import torch
from record_trajectories import make_optimizer
from torch.nn.functional import conv2d


def tensors(tree):
    """Parameters in torch's order of axes."""
    return jax.tree.map(lambda x: torch.nn.Parameter(torch.tensor(to_torch(x))), tree)


def to_torch(x):
    return np.ascontiguousarray(np.transpose(x, (3, 2, 0, 1)) if x.ndim == 4 else x.T)


def from_torch(x):
    x = x.detach().numpy()
    return np.transpose(x, (2, 3, 1, 0)) if x.ndim == 4 else x.T


def forward(net, lora, scales, x):
    conv, body, head = (net[name] for name in ("conv", "body", "head"))
    a, b = lora["conv.kernel"].values()
    change = conv2d(conv2d(x, a, stride=2, padding=1), b[..., None, None])
    x = conv2d(x, conv["kernel"], conv["bias"], stride=2, padding=1) + scales["conv"] * change
    x = torch.tanh(x).mean((2, 3))
    a, b = lora["body.kernel"].values()
    x = x @ body["kernel"].T + body["bias"] + scales["body"] * (x @ a.T @ b.T)
    return torch.tanh(x) @ head["kernel"].T + head["bias"]


@torch.no_grad()
def merge(net, lora, scales):
    for layer in ("conv", "body"):
        a, b = lora[f"{layer}.kernel"].values()
        net[layer]["kernel"] += scales[layer] * (b @ a.flatten(1)).reshape(
            net[layer]["kernel"].shape
        )
        b.zero_()


def record(case):
    """Returns a row for each stage: the arrays at its end, then the losses of its steps."""
    rule, alpha = tests.CASES[case]
    scales = {layer: 1.0 if alpha is None else alpha / r for layer, r in tests.RANKS.items()}
    net, lora = (tensors(tests.start()[name]) for name in ("net", "lora"))
    adapters = [x for adapter in lora.values() for x in adapter.values()]
    rows = []
    for stage in tests.STAGES:
        if stage.merge_lora:
            merge(net, lora, scales)
            everything = [x for layer in net.values() for x in layer.values()]
            groups = [{"params": everything, "lr": stage.train["*"]}]
        else:
            head = {"params": [*net["head"].values()], "lr": stage.train["net.head"]}
            groups = [head, {"params": adapters, "lr": stage.train["lora"]}]
        decay = getattr(rule, "weight_decay", 0.0)
        optimizer = make_optimizer(rule, [{**group, "weight_decay": decay} for group in groups])
        losses = []
        for step in range(len(rows) * tests.STEPS, (len(rows) + 1) * tests.STEPS):
            x, y = map(torch.tensor, tests.batch(step))
            for parameter in [*adapters, *(p for layer in net.values() for p in layer.values())]:
                parameter.grad = None
            outputs = forward(net, lora, scales, x.movedim(-1, 1))
            value = ((outputs - y) ** 2).mean()
            value.backward()
            losses.append(value.item())
            optimizer.step()
        rows.append(tests.row(jax.tree.map(from_torch, {"lora": lora, "net": net}), losses))
    return np.stack(rows)


if __name__ == "__main__":
    np.savez_compressed(tests.GOLDEN, **{case: record(case) for case in tests.CASES})
