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


def orthogonalize(gradient, coefficients, steps, eps):
    """Computes torch's `_zeropower_via_newtonschulz` in the gradient's type instead of bfloat16."""
    x = gradient.T if gradient.size(0) > gradient.size(1) else gradient
    x = x / x.norm().clamp(min=eps)
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if gradient.size(0) > gradient.size(1) else x


def record(case):
    """Trains with torch's optimizers; adds groups to them and edits their learning rates."""
    if case == "muon":
        torch.optim._muon._zeropower_via_newtonschulz = orthogonalize
    decays = tests.CASES[case][0] is tests.decayed
    clips, accumulates = (case in (name, "all") for name in ("clip_by_global_norm", "MultiSteps"))
    params = {
        # Torch stores kernels as [out in], which matters to Muon.
        layer: {name: torch.nn.Parameter(torch.tensor(p.T)) for name, p in arrays.items()}
        for layer, arrays in tests.start().items()
    }
    optimizers, rows, step = {}, [], 0
    for rates in tests.STAGES:
        for group in (group for each in optimizers.values() for group in each.param_groups):
            group["lr"] = rates[group["name"]]
        for layer in list(rates)[-1:]:  # the layer that is new in this stage
            for p in params[layer].values():
                decay = tests.DECAY if p.ndim > 1 else 0.0
                group = {"params": [p], "name": layer, "lr": rates[layer]}
                group["weight_decay"] = decay * decays
                kind, options = torch.optim.AdamW if decays else torch.optim.Adam, {}
                if case == "muon":
                    options = {"eps": 0.0}
                    if p.ndim > 1:
                        kind, options = torch.optim.Muon, {**options, "nesterov": False}
                if kind in optimizers:
                    optimizers[kind].add_param_group(group)
                else:
                    optimizers[kind] = kind([group], **options)
        training = [p for layer in rates for p in params[layer].values()]
        for optimizer in optimizers.values():
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
                for optimizer in optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad()
            step += 1
        leaves = [params[layer][name] for layer in sorted(params) for name in sorted(params[layer])]
        rows.append(np.hstack([p.detach().numpy().T.ravel() for p in leaves]))
    return np.stack(rows)


if __name__ == "__main__":
    np.savez_compressed(tests.GOLDEN, **{case: record(case) for case in tests.CASES})
