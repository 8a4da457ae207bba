"""Records torch's parameters for tests/test_hyperparameter_changes.py.

    python tests/record_hyperparameter_changes.py

Needs torch; recorded with torch 2.13.0, in float64.
"""

import numpy as np
import test_hyperparameter_changes as tests
import torch

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}


def record(seed):
    """Trains with a single optimizer; adds groups to it and edits its param_groups."""
    name, stages = tests.random_plan(seed)
    params = {g: torch.nn.Parameter(torch.tensor(p)) for g, p in tests.start().items()}
    optimizer, rows, step = None, [], 0
    for trains in stages:
        for group, opts in trains.items():
            new_group = {"params": [params[group]], "name": group, **torch_options(opts)}
            if optimizer is None:
                optimizer = OPTIMIZERS[name]([new_group])
            known = {g["name"]: g for g in optimizer.param_groups}
            if group in known:
                known[group].update(torch_options(opts))
            else:
                optimizer.add_param_group(new_group)
        for _ in range(tests.STEPS):
            for group, p in params.items():
                grad = torch.tensor(tests.gradient(p.detach().numpy(), step))
                p.grad = grad if group in trains else None
            optimizer.step()
            step += 1
        rows.append(np.hstack([p.detach().numpy().ravel() for p in params.values()]))
    return np.stack(rows)


def torch_options(opts):
    options = {name: getattr(x, "item", lambda x=x: x)() for name, x in opts.items()}
    if "b1" in options:
        options["betas"] = (options.pop("b1"), options.pop("b2"))
    return options


if __name__ == "__main__":
    np.savez_compressed(tests.GOLDEN, **{str(seed): record(seed) for seed in tests.RECORDED})
