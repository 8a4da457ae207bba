"""Staged training against recordings of torch in float64, for each optimizer and schedule.

Three stages of ten steps; groups are unfrozen between them, or pause in one.
"""

import dataclasses
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import (
    SGD,
    Adagrad,
    Adam,
    AdamW,
    Lion,
    NAdam,
    Optax,
    RAdam,
    ReduceLROnPlateau,
    RMSprop,
    Stage,
)
from jaxft.optim import gradients
from jaxft.optim.optimizers import Optimizer
from jaxft.optim.schedules import (
    ClosedForm,
    Constant,
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    CyclicLR,
    ExponentialLR,
    FastaiOneCycle,
    LambdaLR,
    LinearLR,
    MultiStepLR,
    OneCycleLR,
    PolynomialLR,
    SlantedTriangular,
    StepLR,
    Warmup,
)

GOLDEN = Path(__file__).parent / "golden" / "trajectories.npz"
STEPS, STEPS_PER_EPOCH = 10, 2
VALIDATION = [[1.0, 0.5, 0.6, 0.5, 0.4], [0.4, 0.4, 0.3, 0.35, 0.3], [0.2, 0.3, 0.1, 0.1, 0.1]]

UNFREEZING = (
    {"head": 0.1},
    {"head": 0.05, "late": 0.02},
    {"head": 0.02, "late": 0.01, "body": 0.005},
)
PAUSING = (
    {"head": 0.1, "late": 0.02},
    {"head": 0.05},
    {"late": 0.02, "head": 0.02, "body": 0.01},
)


def factor(epoch):
    return 0.7**epoch


MOMENTUM = SGD(momentum=0.9)
OPTIMIZERS = {
    "sgd": SGD(),
    "sgd, momentum": MOMENTUM,
    "sgd, dampening": SGD(momentum=0.9, dampening=0.3),
    "sgd, nesterov": SGD(momentum=0.8, nesterov=True),
    "sgd, decay": SGD(momentum=0.9, weight_decay=0.1),
    "sgd, decay of matrices": SGD(momentum=0.9, weight_decay=0.1, decay_vectors=False),
    "adam": Adam(),
    "adam, decay": Adam(b1=0.8, b2=0.99, eps=1e-6, weight_decay=0.1),
    "adam, decay of matrices": Adam(weight_decay=0.1, decay_vectors=False),
    "adamw": AdamW(),
    "adamw, decay of matrices": AdamW(weight_decay=0.3, decay_vectors=False),
    "rmsprop": RMSprop(),
    "rmsprop, momentum": RMSprop(alpha=0.9, momentum=0.7, weight_decay=0.05),
    "rmsprop, decay of matrices": RMSprop(weight_decay=0.1, decay_vectors=False),
    # alpha=0.99 would magnify rounding to 1e-11: its first steps are ten times the learning rate.
    "rmsprop, centered": RMSprop(alpha=0.8, centered=True, eps=1e-4),
    "rmsprop, centered, momentum": RMSprop(alpha=0.8, centered=True, momentum=0.5),
    "adam, amsgrad": Adam(amsgrad=True, b2=0.9, weight_decay=0.1),
    "adamw, amsgrad": AdamW(amsgrad=True, b2=0.8),
    "nadam": NAdam(),
    "nadam, decay": NAdam(momentum_decay=0.1, weight_decay=0.1, decay_vectors=False),
    "nadam, decoupled decay": NAdam(weight_decay=0.3, decoupled_weight_decay=True),
    "radam": RAdam(),
    "radam, decay": RAdam(b2=0.9, weight_decay=0.1, decay_vectors=False),
    "radam, decoupled decay": RAdam(b2=0.9, weight_decay=0.3, decoupled_weight_decay=True),
    "adagrad": Adagrad(),
    "adagrad, decay": Adagrad(lr_decay=0.1, initial_accumulator_value=0.2, weight_decay=0.1),
    # Without a decay, equal steps up and down may cancel exactly.
    "lion": Lion(weight_decay=0.01),
    "lion, decay": Lion(b1=0.8, b2=0.9, weight_decay=0.3),
    "optax": Optax("optax:scale_by_adam", {"b1": 0.8}),
}
SCHEDULES = {
    "step": StepLR(2, gamma=0.5),
    "step by step": StepLR(3, gamma=0.7, by="step"),
    "milestones": MultiStepLR((1, 3), gamma=0.3),
    "exponential": ExponentialLR(0.8),
    "cosine": CosineAnnealingLR(),
    "cosine by step": CosineAnnealingLR(eta_min=1e-3, by="step"),
    "polynomial": PolynomialLR(power=2.0),
    "linear": LinearLR(total_iters=3),
    "warm-up": Warmup(2, then=CosineAnnealingLR()),
    "one-cycle": OneCycleLR(pct_start=0.45),
    "fastai": FastaiOneCycle(),
    "ulmfit": SlantedTriangular(),
    "restarts": CosineAnnealingWarmRestarts(2, eta_min=1e-3, by="step"),
    "cyclic": CyclicLR(3, 2),
    "lambda": LambdaLR("test_trajectories:factor"),
    "plateau": ReduceLROnPlateau(patience=0, factor=0.5, cooldown=1),
}
CASES = {  # name: optimizer, schedule, carry, train, max_norm
    f"{name}, {carry}": (rule, Constant(), carry, UNFREEZING, None)
    for name, rule in OPTIMIZERS.items()
    for carry in ("keep", "reset")
}
CASES |= {
    f"{name}, sitting out": (rule, Constant(), "keep", PAUSING, None)
    for name, rule in OPTIMIZERS.items()
}
CASES |= {
    f"{name}, {carry}": (MOMENTUM, schedule, carry, UNFREEZING, None)
    for name, schedule in SCHEDULES.items()
    for carry in ("keep", "reset")
}
CASES |= {
    f"{name}, adam, {carry}": (Adam(), SCHEDULES[name], carry, UNFREEZING, None)
    for name in ("cosine by step", "one-cycle", "fastai", "plateau")
    for carry in ("keep", "reset")
}
CASES |= {  # momenta of a schedule
    f"one-cycle, {name}": (OPTIMIZERS[name], SCHEDULES["one-cycle"], "keep", UNFREEZING, None)
    for name in ("adam, amsgrad", "nadam", "radam, decay", "lion")
}
CASES |= {
    f"{name}, {rule.rule}, sitting out": (rule, SCHEDULES[name], "keep", PAUSING, None)
    for name in ("one-cycle", "plateau")
    for rule in (MOMENTUM, Adam())
}
CASES |= {
    f"clipped, {carry}": (MOMENTUM, Constant(), carry, UNFREEZING, 0.2)
    for carry in ("keep", "reset")
}
CASES |= {"clipped, sitting out": (MOMENTUM, Constant(), "keep", PAUSING, 0.2)}

SPANS = {  # name: optimizer, schedule of all stages together
    "span, one-cycle": (MOMENTUM, OneCycleLR()),
    "span, one-cycle, adam": (Adam(), OneCycleLR(pct_start=0.5)),
    "span, cosine": (MOMENTUM, CosineAnnealingLR()),
    "span, cosine by step": (Adam(), CosineAnnealingLR(by="step")),
    "span, milestones": (MOMENTUM, MultiStepLR((7, 11), gamma=0.3)),
    "span, exponential": (MOMENTUM, ExponentialLR(0.9, by="step")),
}
SPANNING = (  # a torch scheduler keeps the base learning rates of its groups
    {"head": 0.1},
    {"head": 0.1, "late": 0.02},
    {"head": 0.1, "late": 0.02, "body": 0.005},
)


def stages(schedule, carry, trains):
    return [
        Stage(str(k), rates, epochs=STEPS // STEPS_PER_EPOCH, schedule=schedule, carry=carry)
        for k, rates in enumerate(trains)
    ]


def start():
    """Returns the parameters of two tanh layers and a head, NumPy float64."""
    rng = np.random.default_rng(0)
    shapes = {"body": (3, 4), "late": (4, 4), "head": (4, 2)}
    return {
        name: {"kernel": rng.normal(size=shape) / 2, "bias": rng.normal(size=shape[1:]) / 4}
        for name, shape in shapes.items()
    }


def batch(step):
    """Returns inputs [5 3] and targets [5 2] of a step of the run."""
    rng = np.random.default_rng([1, step])
    return rng.normal(size=(5, 3)), rng.normal(size=(5, 2))


def loss(params, x, y):
    for name in ("body", "late"):
        x = jnp.tanh(x @ params[name]["kernel"] + params[name]["bias"])
    return jnp.mean((x @ params["head"]["kernel"] + params["head"]["bias"] - y) ** 2)


def train(case):
    """Returns a row for each stage: the parameters at its end, then the losses of its steps."""
    rule, schedule, carry, trains, max_norm = CASES[case]
    return train_stages(rule, stages(schedule, carry, trains), max_norm)


def spanned_stages(schedule):
    return [
        dataclasses.replace(stage, schedule_time="continue")
        for stage in stages(schedule, "keep", SPANNING)
    ]


def train_stages(rule, stages, max_norm=None):
    """Returns a row for each stage: the parameters at its end, then the losses of its steps."""
    params, state, rows = jax.tree.map(jnp.asarray, start()), None, []
    for k, plan in enumerate(jaxft.plan(stages, params)):
        transform = plan.transform(rule, steps_per_epoch=STEPS_PER_EPOCH)
        fresh = transform.init(params)
        keep = k > 0 and plan.stage.carry == "keep"
        state = jaxft.carry(state, fresh, park=plan.park) if keep else fresh
        trainable, frozen = jaxft.partition(params, plan.labels)

        @jax.jit
        def step(trainable, frozen, state, x, y, transform=transform):
            value, grads = jax.value_and_grad(
                lambda trainable: loss(jaxft.combine(trainable, frozen), x, y)
            )(trainable)
            if max_norm:
                grads, _ = gradients.clip(grads, max_norm)
            updates, state = transform.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        losses = []
        for i in range(STEPS):
            trainable, state, value = step(trainable, frozen, state, *batch(k * STEPS + i))
            losses.append(value)
            if (i + 1) % STEPS_PER_EPOCH == 0:
                state = plan.after_epoch(state, loss=VALIDATION[k][i // STEPS_PER_EPOCH])
        params = jaxft.combine(trainable, frozen)
        rows.append(np.hstack([*map(np.ravel, jax.tree.leaves(params)), losses]))
    return np.stack(rows)


@pytest.mark.parametrize(
    "case",  # every fifth runs by default
    [pytest.param(c, marks=pytest.mark.slow if i % 5 else ()) for i, c in enumerate(CASES)],
)
def test_trajectory_equals_torch(case, golden):
    with jax.enable_x64(True):
        np.testing.assert_allclose(train(case), golden[case], rtol=1e-10)


@pytest.mark.parametrize("case", SPANS)
def test_trajectory_of_a_schedule_that_spans_stages_equals_torch(case, golden):
    rule, schedule = SPANS[case]
    with jax.enable_x64(True):
        rows = train_stages(rule, spanned_stages(schedule))
    np.testing.assert_allclose(rows, golden[case], rtol=1e-10)


def test_trajectories_cover_all_optimizers_and_schedules(golden):
    assert golden.keys() == CASES.keys() | SPANS.keys()
    rules, schedules, *_ = zip(*CASES.values(), strict=True)
    assert {*map(type, rules)} == {*get_args(Optimizer)}
    assert {*map(type, schedules)} == {*get_args(ClosedForm), ReduceLROnPlateau}


def test_trajectory_changes_trainable_parameters_only(golden):
    blocks = {name: np.hstack([*map(np.ravel, jax.tree.leaves(b))]) for name, b in start().items()}
    ends = np.cumsum([blocks[name].size for name in sorted(blocks)])
    for case, (_, _, _, trains, _) in CASES.items():
        before = blocks
        for rates, row in zip(trains, golden[case], strict=True):
            after = dict(zip(sorted(blocks), np.split(row, ends)[:-1], strict=True))
            for name in blocks:
                assert np.all((after[name] != before[name]) == (name in rates)), (case, name)
            before = after


@pytest.mark.slow
def test_trajectory_recording_equals_torch(golden):
    pytest.importorskip("torch")
    from record_trajectories import record, record_span

    for case in golden:  # to 1e-10, because other machines round differently
        row = record_span(case) if case in SPANS else record(case)
        np.testing.assert_allclose(row, golden[case], rtol=1e-10, err_msg=case)
