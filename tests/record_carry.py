"""Records torch's parameters for tests/optim/test_carry_torch.py.

    python tests/record_carry.py

Needs torch; recorded with torch 2.13.0, in float64.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.append(str(Path(__file__).parent / "optim"))
import test_carry_torch as tests


def record(case):
    """Trains with a single optimizer; adds groups to it and edits their learning rates."""
    decays = tests.CASES[case][0] is tests.decayed
    clips, accumulates = (case in (name, "all") for name in ("clip_by_global_norm", "MultiSteps"))
    params = {
        layer: {name: torch.nn.Parameter(torch.tensor(p)) for name, p in arrays.items()}
        for layer, arrays in tests.start().items()
    }
    optimizer, rows, step = None, [], 0
    for rates in tests.STAGES:
        for layer, rate in rates.items():
            if optimizer and layer in (group["name"] for group in optimizer.param_groups):
                for group in optimizer.param_groups:
                    group["lr"] = rates[group["name"]]
                continue
            for p in params[layer].values():
                decay = tests.DECAY if p.ndim > 1 else 0.0
                group = {"params": [p], "name": layer, "lr": rate, "weight_decay": decay * decays}
                if optimizer:
                    optimizer.add_param_group(group)
                else:
                    optimizer = (torch.optim.AdamW if decays else torch.optim.Adam)([group])
        training = [p for layer in rates for p in params[layer].values()]
        optimizer.zero_grad()  # gradients of an incomplete step are dropped
        every = tests.MINI_STEPS if accumulates else 1
        for count in range(1, tests.STEPS + 1):
            for p in training:
                grad = torch.tensor(tests.gradient(p.detach().numpy(), step)) / every
                p.grad = grad if p.grad is None else p.grad + grad
            if count % every == 0:
                if clips:  # torch's clip_grad_norm_ divides by the norm plus 1e-6
                    norm = torch.linalg.vector_norm(torch.cat([p.grad.ravel() for p in training]))
                    for p in training:
                        p.grad *= min(1.0, tests.MAX_NORM / norm)
                optimizer.step()
                optimizer.zero_grad()
            step += 1
        leaves = [params[layer][name] for layer in sorted(params) for name in sorted(params[layer])]
        rows.append(np.hstack([p.detach().numpy().ravel() for p in leaves]))
    return np.stack(rows)


if __name__ == "__main__":
    np.savez_compressed(tests.GOLDEN, **{case: record(case) for case in tests.CASES})
