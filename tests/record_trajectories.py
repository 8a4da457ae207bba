"""Records parameters and losses of torch training in stages, for tests/test_trajectories.py.

    python tests/record_trajectories.py

Needs torch; recorded with torch 2.13.0, in float64.
"""

import dataclasses
from contextlib import contextmanager

import numpy as np
import record_schedules
import test_trajectories as tests
import torch

from jaxft import Adam, Optax
from jaxft.optim.plateau import ReduceLROnPlateau
from jaxft.optim.schedules import FastaiOneCycle, SlantedTriangular


class Lion(torch.optim.Optimizer):
    """The algorithm of the authors' code, google/automl."""

    def __init__(self, groups, betas):
        super().__init__(groups, {"betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(group["lr"] * torch.sign(b1 * average + (1 - b1) * p.grad))
                average.mul_(b2).add_((1 - b2) * p.grad)


OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adagrad": torch.optim.Adagrad,
    "lion": Lion,
}


def make_optimizer(rule, groups):
    """Returns torch's optimizer of the same name; `decay_vectors` needs a decay per group."""
    options = dataclasses.asdict(rule)
    if isinstance(rule, Optax):
        options = dataclasses.asdict(Adam(**rule.arguments))
    kind, _, _ = (options.pop(name) for name in ("rule", "decay_vectors", "weight_decay"))
    if "b1" in options:
        options["betas"] = (options.pop("b1"), options.pop("b2"))
    return OPTIMIZERS[kind](groups, **options)


@contextmanager
def float64_scalars():
    """Makes float64 the default dtype, in which torch keeps NAdam's product of b1."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def make_groups(rule, params, stage):
    """Returns torch's param groups, each of jaxft's divided into matrices and vectors."""
    groups = []
    for name, parameters in params.items():
        for vectors in (False, True):
            members = [p for p in parameters.values() if (p.ndim == 1) == vectors]
            spared = vectors and not getattr(rule, "decay_vectors", True)
            decay = 0.0 if spared else getattr(rule, "weight_decay", 0.0)
            lr = stage.train.get(name, 0.0)
            if members:
                groups.append({"params": members, "lr": lr, "weight_decay": decay, "name": name})
    return groups


@float64_scalars()
def record(case):
    """Returns a row for each stage: the parameters at its end, then the losses of its steps."""
    rule, schedule, carry, trains, max_norm = tests.CASES[case]
    params = {
        name: {k: torch.nn.Parameter(torch.tensor(v)) for k, v in block.items()}
        for name, block in tests.start().items()
    }
    optimizer, rows = None, []
    for k, stage in enumerate(tests.stages(schedule, carry, trains)):
        active = [name for name in params if name in stage.train]
        for name, block in params.items():
            for p in block.values():
                p.requires_grad_(name in active)
                p.grad = None  # a re-frozen parameter has no gradient and is passed over
        groups = make_groups(rule, {name: params[name] for name in active}, stage)
        if optimizer is None or carry == "reset":
            optimizer = make_optimizer(rule, groups)
        else:
            known = {group["name"] for group in optimizer.param_groups}
            for group in groups:
                if group["name"] not in known:
                    optimizer.add_param_group(group)
        for group in optimizer.param_groups:
            group["lr"] = stage.train.get(group["name"], 0.0)
            group.pop("initial_lr", None)
        by, follow = make_scheduler(rule, schedule, optimizer, stage)
        losses = []
        for step in range(tests.STEPS):
            optimizer.zero_grad()
            value = loss(params, k * tests.STEPS + step)
            value.backward()
            losses.append(value.item())
            if max_norm:
                members = [p for name in active for p in params[name].values()]
                torch.nn.utils.clip_grad_norm_(members, max_norm)
            optimizer.step()
            if by == "step" and step + 1 < tests.STEPS:
                follow()
            elif by == "epoch" and (step + 1) % tests.STEPS_PER_EPOCH == 0:
                epoch = (step + 1) // tests.STEPS_PER_EPOCH
                follow(tests.VALIDATION[k][epoch - 1])
        rows.append(np.append(flat(params), losses))
    return np.stack(rows)


@float64_scalars()
def record_span(case):
    """Returns the rows of one torch optimizer and one scheduler for all stages.

    The groups of a stage join both by `add_param_group`.
    """
    rule, schedule = tests.SPANS[case]
    params = {
        name: {k: torch.nn.Parameter(torch.tensor(v)) for k, v in block.items()}
        for name, block in tests.start().items()
    }
    stages = tests.spanned_stages(schedule)
    optimizer = make_optimizer(rule, make_groups(rule, {"head": params["head"]}, stages[0]))
    total = sum(s.epochs if schedule.by == "epoch" else tests.STEPS for s in stages)
    scheduler, known, rows = record_schedules.scheduler(schedule, optimizer, total), {"head"}, []
    for k, stage in enumerate(stages):
        new = {name: block for name, block in params.items() if name in {*stage.train} - known}
        for group in make_groups(rule, new, stage):
            first = optimizer.param_groups[0]
            ratio = group["lr"] / stage.train["head"]
            for name, value in first.items():
                if name.endswith("lr"):  # lr, initial_lr, and OneCycleLR's max_lr and min_lr
                    group[name] = ratio * value
                group.setdefault(name, value)  # OneCycleLR's momenta
            optimizer.add_param_group(group)
            scheduler.base_lrs.append(group["initial_lr"])
        known |= {*new}
        losses = []
        for step in range(k * tests.STEPS, (k + 1) * tests.STEPS):
            optimizer.zero_grad()
            value = loss(params, step)
            value.backward()
            losses.append(value.item())
            optimizer.step()
            is_last = step + 1 == len(stages) * tests.STEPS
            if not is_last and (schedule.by == "step" or (step + 1) % tests.STEPS_PER_EPOCH == 0):
                scheduler.step()
        rows.append(np.append(flat(params), losses))
    return np.stack(rows)


def make_scheduler(rule, schedule, optimizer, stage):
    """What moves the rates of this stage: its unit, and a function to call after each."""
    if isinstance(schedule, ReduceLROnPlateau):
        options = dataclasses.asdict(schedule)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **options)
        return "epoch", plateau.step
    total = stage.epochs if schedule.by == "epoch" else tests.STEPS
    if isinstance(schedule, FastaiOneCycle | SlantedTriangular):
        return "step", by_formula(rule, schedule, optimizer, total)
    # OneCycleLR insists on setting rates of groups that do not train: their maximum is any number.
    scheduler = record_schedules.scheduler(schedule, optimizer, total)
    return schedule.by, lambda *_: scheduler.step()


def by_formula(rule, schedule, optimizer, total):
    """Fastai's and ULMFiT's schedules have no torch class: their formulas, set by hand."""
    base = [group["lr"] for group in optimizer.param_groups]
    t = 0

    def place():
        for lr, group in zip(base, optimizer.param_groups, strict=True):
            if isinstance(schedule, SlantedTriangular):
                cut = int(total * 0.1)
                p = t / cut if t < cut else 1 - (t - cut) / (cut * (1 / 0.1 - 1))
                group["lr"] = lr * (1 + p * 31) / 32
                continue
            rise = t / total < 0.25
            done = t / total / 0.25 if rise else (t / total - 0.25) / 0.75
            weight = (1 - np.cos(np.pi * done)) / 2
            start, end = (lr / 25, lr) if rise else (lr, lr / 1e5)
            group["lr"] = start + (end - start) * weight
            start, end = (0.95, 0.85) if rise else (0.85, 0.95)
            momentum = start + (end - start) * weight
            if rule.rule == "sgd":
                group["momentum"] = momentum
            else:
                group["betas"] = (momentum, group["betas"][1])

    def follow(*_):
        nonlocal t
        t += 1
        place()

    place()
    return follow


def loss(params, step):
    x, y = (torch.tensor(array) for array in tests.batch(step))
    for name in ("body", "late"):
        x = torch.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return ((x @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2).mean()


def flat(params):
    return np.concatenate([
        params[name][leaf].detach().numpy().ravel()
        for name in sorted(params)
        for leaf in sorted(params[name])
    ])  # fmt: skip


if __name__ == "__main__":
    cases = {case: record(case) for case in tests.CASES}
    spans = {case: record_span(case) for case in tests.SPANS}
    np.savez_compressed(tests.GOLDEN, **cases, **spans)
