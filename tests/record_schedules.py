"""Records torch's learning rates and momenta for tests/optim/test_schedules.py.

    python tests/record_schedules.py

Needs torch; recorded with torch 2.13.0.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
from torch.optim import lr_scheduler

sys.path.insert(0, str(Path(__file__).parent / "optim"))

import test_schedules as tests

from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.optim.schedules import Warmup
from jaxft.user_function import find


def optimizer(rule):
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in tests.RATES]
    return torch.optim.SGD(groups, momentum=0.5) if rule == "sgd" else torch.optim.Adam(groups)


def scheduler(schedule, optimizer, total):
    """Returns torch's scheduler; fields with their default keep torch's default."""
    if isinstance(schedule, Warmup):
        rise = {"start_factor": schedule.start_factor, "total_iters": schedule.length}
        parts = [
            lr_scheduler.LinearLR(optimizer, **rise),
            scheduler(schedule.then, optimizer, total - schedule.length),
        ]
        return lr_scheduler.SequentialLR(optimizer, parts, milestones=[schedule.length])
    name = type(schedule).__name__
    arguments = {
        field.name: getattr(schedule, field.name)
        for field in dataclasses.fields(schedule)
        if field.name != "by" and getattr(schedule, field.name) != field.default
    }
    if name == "CosineAnnealingLR":
        arguments["T_max"] = arguments.pop("t_max", total)
    if name == "PolynomialLR":
        arguments.setdefault("total_iters", total)
    if name == "OneCycleLR":
        arguments = {
            "total_steps": total,
            "max_lr": [group["lr"] for group in optimizer.param_groups],
            **arguments,
        }
    if name == "CosineAnnealingWarmRestarts":
        arguments = {name.replace("t_", "T_"): value for name, value in arguments.items()}
    if name == "CyclicLR":
        arguments.pop("div_factor", None)
        peaks = [group["lr"] for group in optimizer.param_groups]
        arguments["max_lr"] = peaks
        arguments["base_lr"] = [peak / schedule.div_factor for peak in peaks]
    if name == "LambdaLR":
        arguments = {"lr_lambda": find(schedule.function)}
    if name == "Constant":
        return lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return getattr(lr_scheduler, name)(optimizer, **arguments)


def closed_form(schedule, total, rule):
    """Returns the learning rates of both groups and the momentum at each step, [time 3]."""
    optim, rows = optimizer(rule), []
    torch_scheduler = scheduler(schedule, optim, total)
    for t in range(total):
        group = optim.param_groups[0]
        momentum = group["momentum"] if rule == "sgd" else group["betas"][0]
        rows.append([*(group["lr"] for group in optim.param_groups), momentum])
        optim.step()
        if t + 1 < total:
            torch_scheduler.step()
    return np.array(rows, np.float64)


def plateau(schedule: ReduceLROnPlateau, values):
    """Rates [epoch, group] after each epoch's value."""
    optim, rates = optimizer("sgd"), []
    torch_scheduler = scheduler(schedule, optim, None)
    for value in values:
        torch_scheduler.step(value)
        rates.append([group["lr"] for group in optim.param_groups])
    return rates


def record() -> dict[str, np.ndarray]:
    recorded = {}
    for name, (schedule, total) in tests.CLOSED_FORMS.items():
        sgd, adam = (closed_form(schedule, total, rule) for rule in ("sgd", "adam"))
        np.testing.assert_array_equal(sgd[:, :2], adam[:, :2])
        recorded[name] = np.column_stack([sgd, adam[:, 2]])
    for name, (schedule, values) in tests.PLATEAUS.items():
        recorded[name] = np.array(plateau(schedule, values), np.float64)
    return recorded


if __name__ == "__main__":
    np.savez_compressed(tests.GOLDEN, **record())
