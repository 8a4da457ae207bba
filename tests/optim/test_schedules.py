"""Schedules against recorded torch schedulers, and against fastai's and ULMFiT's formulas."""

import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.errors import RecipeError
from jaxft.optim.plateau import PlateauState, ReduceLROnPlateau
from jaxft.optim.schedules import (
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

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules.npz"
RATES = (0.1, 0.003)  # of the two groups


def stairs(t):
    """The factor of a LambdaLR: a Python function that cannot be traced."""
    return 1.0 if t < 5 else 0.9**t if t % 2 else 0


def negative_after_2(t):
    return 2 - t


def fails(t):
    raise OSError("no file")


def wrong_type(t):
    return "0.1"


CLOSED_FORMS = {  # name: schedule, total
    "constant": (Constant(), 30),
    "step": (StepLR(7), 30),
    "step each epoch": (StepLR(1, gamma=0.8), 40),
    "step up": (StepLR(9, gamma=1.5), 40),
    "milestones": (MultiStepLR((5, 10)), 30),
    "milestones, near": (MultiStepLR((1, 2, 29), gamma=0.3), 40),
    "exponential": (ExponentialLR(0.95), 40),
    "exponential, steep": (ExponentialLR(0.7), 30),
    "cosine": (CosineAnnealingLR(), 37),
    "cosine to a floor": (CosineAnnealingLR(eta_min=1e-3), 40),
    "cosine, several times": (CosineAnnealingLR(t_max=11, eta_min=1e-4), 60),
    "cosine, shorter stage": (CosineAnnealingLR(t_max=50), 30),
    "polynomial": (PolynomialLR(), 37),
    "polynomial, squared": (PolynomialLR(power=2.0), 40),
    "polynomial, then 0": (PolynomialLR(total_iters=22, power=0.9), 40),
    "linear": (LinearLR(), 30),
    "linear down": (LinearLR(start_factor=1.0, end_factor=0.0, total_iters=25), 40),
    "linear, shorter stage": (LinearLR(start_factor=0.01, end_factor=0.6, total_iters=50), 30),
    "warm-up, cosine": (Warmup(5, CosineAnnealingLR()), 40),
    "warm-up, step": (Warmup(3, StepLR(7, gamma=0.5), start_factor=0.01), 40),
    "warm-up, milestones": (Warmup(4, MultiStepLR((10, 20)), start_factor=1.0), 40),
    "warm-up, polynomial": (Warmup(10, PolynomialLR(power=2.0), start_factor=0.1), 40),
    "one-cycle": (OneCycleLR(), 40),
    "one-cycle, odd length": (OneCycleLR(pct_start=0.41), 37),
    "one-cycle, linear": (OneCycleLR(anneal_strategy="linear"), 100),
    "one-cycle, three phases": (OneCycleLR(three_phase=True), 40),
    "one-cycle, late three phases": (OneCycleLR(three_phase=True, pct_start=0.6), 40),
    "one-cycle, linear phases": (OneCycleLR(three_phase=True, anneal_strategy="linear"), 37),
    "one-cycle, longer than its stage": (OneCycleLR(total_steps=50, div_factor=5.0), 30),
    "one-cycle, from the peak": (OneCycleLR(pct_start=0.0, final_div_factor=10.0), 30),
    "one-cycle, to the peak": (OneCycleLR(pct_start=1.0), 30),
    "one-cycle, momenta": (OneCycleLR(base_momentum=0.5, max_momentum=0.99), 30),
    "one-cycle, rate alone": (OneCycleLR(cycle_momentum=False), 30),
    "restarts": (CosineAnnealingWarmRestarts(7), 30),
    "restarts, each longer": (CosineAnnealingWarmRestarts(4, t_mult=2, eta_min=1e-3), 60),
    "restarts, at the end": (CosineAnnealingWarmRestarts(3, t_mult=3), 40),
    "restarts, shorter stage": (CosineAnnealingWarmRestarts(50, t_mult=2), 30),
    "warm-up, restarts": (Warmup(4, CosineAnnealingWarmRestarts(5, t_mult=2)), 40),
    "cyclic": (CyclicLR(7), 40),
    "cyclic, slow fall": (CyclicLR(3, 10, div_factor=10.0), 60),
    "cyclic, halved": (CyclicLR(4, mode="triangular2", base_momentum=0.5), 40),
    "cyclic, halved, slow rise": (CyclicLR(9, 2, mode="triangular2", max_momentum=0.95), 60),
    "cyclic, exponential": (CyclicLR(6, 3, mode="exp_range", gamma=0.95), 40),
    "cyclic, longer than its stage": (CyclicLR(cycle_momentum=False), 30),
    "lambda": (LambdaLR("test_schedules:stairs"), 40),
    "lambda by step": (LambdaLR("test_schedules:stairs", by="step"), 30),
}

NAN = math.nan
FALLING = [1.0, 0.9, 0.8, 0.7, 0.6]
WAVES = [round(1 + math.cos(i * i), 2) for i in range(40)]  # ties included
STUCK = [*FALLING, *[0.6] * 30]
PLATEAUS = {  # name: schedule, the metric of each epoch
    "plateau": (ReduceLROnPlateau(), STUCK),
    "plateau, impatient": (ReduceLROnPlateau(patience=0), WAVES),
    "plateau, NaN": (
        ReduceLROnPlateau(patience=1),
        [NAN, NAN, 1.0, NAN, 0.5, NAN, NAN, 0.4, 0.4, NAN, *FALLING, *[NAN] * 20],
    ),
    "plateau, cooldown": (ReduceLROnPlateau(patience=1, cooldown=3, factor=0.5), [*WAVES, *STUCK]),
    "plateau, floor": (ReduceLROnPlateau(patience=1, factor=0.3, min_lr=1e-3), STUCK),
    "plateau, floor above a group": (ReduceLROnPlateau(patience=1, min_lr=0.02), STUCK),
    "plateau, eps": (ReduceLROnPlateau(patience=0, factor=0.5, eps=1e-3), STUCK),
    "plateau, no eps": (ReduceLROnPlateau(patience=0, eps=0.0), STUCK),
    "plateau, threshold": (
        ReduceLROnPlateau(patience=2, threshold=0.2, factor=0.5),
        [0.97**i for i in range(40)],
    ),
    "plateau, absolute": (
        ReduceLROnPlateau(patience=2, threshold=0.2, threshold_mode="abs", factor=0.5),
        [2 - 0.1 * i for i in range(40)],
    ),
    "plateau, upward": (ReduceLROnPlateau("max", patience=2, factor=0.5), [*WAVES, *[NAN] * 5]),
    "plateau, upward, absolute": (
        ReduceLROnPlateau("max", patience=1, threshold=0.05, threshold_mode="abs", factor=0.7),
        [1 - 0.9**i for i in range(40)],
    ),
    "plateau, below zero": (ReduceLROnPlateau(patience=2, factor=0.5), [-i / 9 for i in range(40)]),
    "plateau, up below zero": (
        ReduceLROnPlateau("max", patience=2, threshold=0.3, factor=0.9),
        [-(0.9**i) for i in range(40)],
    ),
}

OTHERS = {  # without a counterpart in torch
    "fastai": (FastaiOneCycle(), 40),
    "fastai fine_tune, frozen": (FastaiOneCycle(pct_start=0.99), 37),
    "fastai fine_tune, thawed": (FastaiOneCycle(pct_start=0.3, div=5.0), 37),
    "ulmfit": (SlantedTriangular(), 40),
    "ulmfit, odd length": (SlantedTriangular(cut_frac=0.3, ratio=10.0), 37),
    "warm-up, one-cycle": (Warmup(5, OneCycleLR()), 40),
}
ALL = CLOSED_FORMS | OTHERS


def cases(names):
    return pytest.mark.parametrize("name", names)


def evaluate(schedule, total):
    """Returns the learning rates [time, group] and momenta [time], or None, of a stage."""
    times = jnp.arange(100)  # the same shape for all, so that JAX compiles each operation once
    rates = [schedule.lr_at(lr, times, total) for lr in RATES]
    momenta = schedule.momentum(times, total)
    rates = np.stack([rate[:total] for rate in rates], axis=1)
    return rates, None if momenta is None else momenta[:total]


@cases(CLOSED_FORMS)
@pytest.mark.parametrize(("x64", "rtol"), [(True, 1e-12), (False, 2e-6)], ids=["x64", "x32"])
def test_schedules_equal_torch(golden, name, x64, rtol):
    with jax.enable_x64(x64):
        rates, momenta = evaluate(*CLOSED_FORMS[name])
    # float32 rounds the end of a phase between two steps, hence rtol above 1e-6.
    assert rates.dtype == (np.float64 if x64 else np.float32)
    torch_rates, sgd, adam = np.split(golden[name], [2, 3], axis=1)
    # Torch multiplies from step to step, so that its zeros become about 1e-17.
    np.testing.assert_allclose(rates, torch_rates, rtol=rtol, atol=1e-16)
    for momentum, unscheduled in ((sgd, 0.5), (adam, 0.9)):
        actual = unscheduled if momenta is None else momenta
        np.testing.assert_allclose(actual, momentum[:, 0], rtol=rtol)


@pytest.mark.slow
@cases(PLATEAUS)
def test_reduce_lr_on_plateau_equals_torch(golden, name):
    plateau, values = PLATEAUS[name]
    state, rates = plateau.start(), []
    with jax.enable_x64(True):
        for value in values:
            state = plateau.after_epoch(state, value)
            rates.append([plateau.lr_at(lr, state) for lr in RATES])
    np.testing.assert_array_equal(rates, golden[name])


@pytest.mark.slow
def test_recording_equals_torch(golden):
    pytest.importorskip("torch")
    from record_schedules import record

    recorded = record()
    assert recorded.keys() == golden.keys()
    for name, values in recorded.items():
        np.testing.assert_allclose(values, golden[name], rtol=1e-13, atol=1e-16, err_msg=name)


def test_fastai_one_cycle_equals_fastai():
    def sched_cos(start, end, position):
        return start + (1 + np.cos(np.pi * (1 - position))) * (end - start) / 2

    def combined_cos(pct, start, middle, end, position):
        if position < pct:
            return sched_cos(start, middle, position / pct)
        return sched_cos(middle, end, (position - pct) / (1 - pct))

    for schedule, total in [OTHERS[name] for name in OTHERS if name.startswith("fastai")]:
        with jax.enable_x64(True):
            rates, momenta = evaluate(schedule, total)
        lr, pct, positions = RATES[0], schedule.pct_start, np.arange(total) / total
        expected = [
            combined_cos(pct, lr / schedule.div, lr, lr / 1e5, position) for position in positions
        ]
        np.testing.assert_allclose(rates[:, 0], expected, rtol=1e-12)
        expected = [combined_cos(pct, 0.95, 0.85, 0.95, position) for position in positions]
        np.testing.assert_allclose(momenta, expected, rtol=1e-12)


@pytest.mark.parametrize(("total", "cut_frac", "ratio"), [(40, 0.1, 32.0), (30, 0.2, 5.0)])
def test_slanted_triangular_equals_the_paper(total, cut_frac, ratio):
    cut = math.floor(total * cut_frac)
    t = np.arange(total)
    p = np.where(t < cut, t / cut, 1 - (t - cut) / (cut * (1 / cut_frac - 1)))
    with jax.enable_x64(True):
        rates, _ = evaluate(SlantedTriangular(cut_frac, ratio), total)
    expected = RATES[0] * (1 + p * (ratio - 1)) / ratio
    np.testing.assert_allclose(rates[:, 0], expected, rtol=1e-12)


def test_warmup_delays_one_cycle():
    schedule, (after, _) = Warmup(5, OneCycleLR()), evaluate(OneCycleLR(), 35)
    rates, momenta = evaluate(schedule, 40)
    np.testing.assert_allclose(rates[:5, 0], 0.1 * np.linspace(1 / 3, 1, 6)[:5], rtol=1e-6)
    np.testing.assert_array_equal(rates[5:], after)
    np.testing.assert_array_equal(momenta[:6], np.float32(0.95))
    assert schedule.by == "step"


@pytest.mark.slow
@cases(
    [
        "constant",
        "step",
        "milestones",
        "exponential",
        "cosine",
        "polynomial",
        "linear",
        "restarts, each longer",
        "cyclic, halved",
        "lambda",
        *OTHERS,
    ]
)
def test_schedules_accept_traced_and_mapped_times(name):
    schedule, total = ALL[name]

    def rate_and_momentum(t):
        return schedule.lr_at(0.1, t, total), schedule.momentum(t, total)

    times = jnp.arange(0, total, 7)
    one_by_one = [rate_and_momentum(int(t)) for t in times]
    jitted = jax.jit(rate_and_momentum)
    for (rate, momentum), t in zip(one_by_one, times, strict=True):
        assert rate.shape == ()
        assert rate.dtype == jnp.float32
        assert not rate.weak_type
        traced_rate, traced_momentum = jitted(t)
        np.testing.assert_allclose(rate, traced_rate, rtol=1e-6, atol=1e-12)
        if momentum is None:
            assert traced_momentum is None
        else:
            np.testing.assert_allclose(momentum, traced_momentum, rtol=1e-6)
    mapped = jax.vmap(lambda t: rate_and_momentum(t)[0])(times)
    np.testing.assert_allclose(mapped, [rate for rate, _ in one_by_one], rtol=1e-6, atol=1e-12)


@pytest.mark.slow
@cases(ALL)
def test_schedules_of_any_length_are_finite_and_not_negative(name):
    schedule, _ = ALL[name]
    for total in (1, 2, 3, 10, 19):  # 10 · 0.1 = 1: an empty first phase
        rates, momenta = evaluate(schedule, total)
        assert np.all(np.isfinite(rates))
        assert np.all(rates >= 0)
        assert momenta is None or np.all((momenta >= 0.5) & (momenta <= 0.99))
    assert hash(schedule) == hash(ALL[name][0])


def test_one_cycle_with_an_empty_phase_starts_at_the_peak():
    rates, momenta = evaluate(OneCycleLR(pct_start=0.1), 10)  # torch divides by zero
    np.testing.assert_allclose((rates[0, 0], momenta[0]), (0.1, 0.85), rtol=1e-6)


def test_reduce_lr_on_plateau_state_is_plain_numbers():
    plateau = ReduceLROnPlateau("max", patience=0, cooldown=2)
    assert plateau.start() == PlateauState(-math.inf, 0, 0, 0)
    state = plateau.after_epoch(PlateauState(1.0, 0, 0, 0), np.float32(0.5))
    assert state == PlateauState(best=1.0, bad=0, cooldown=2, reductions=1)
    better = plateau.after_epoch(state, np.float32(1.5))
    assert better == PlateauState(best=1.5, bad=0, cooldown=1, reductions=1)
    assert [type(x) for x in better] == [float, int, int, int]


def test_lambda_lr_rejects_a_later_value():
    schedule = LambdaLR("test_schedules:negative_after_2")
    assert schedule.lr_at(1.0, 2, total=2) == 0
    with pytest.raises(
        RecipeError, match=r"negative_after_2\(3\) returned -1; it must be a number"
    ):
        schedule.lr_at(1.0, 0, total=3)


def test_warmup_from_zero():
    schedule = Warmup(4, Constant(by="step"), start_factor=0.0)
    rates = [float(schedule.lr_at(0.5, t, total=6)) for t in range(6)]
    assert rates == [0.0, 0.125, 0.25, 0.375, 0.5, 0.5]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Constant(by="batch"), "Constant: by is 'batch'; it must be 'epoch' or 'step'."),
        (lambda: StepLR(0), "StepLR: step_size is 0; it must be at least 1."),
        (lambda: StepLR(0, gamma=0.0, by="x"), "step_size is 0.*; gamma is 0.0.*; by is 'x'"),
        (lambda: StepLR(1, gamma=NAN), "gamma is nan; it must be positive"),
        (lambda: MultiStepLR(()), "MultiStepLR: milestones is ()"),
        (lambda: MultiStepLR((5, 3)), "milestones is (5, 3); it must be a rising tuple, from 1."),
        (lambda: MultiStepLR((0, 3)), "milestones is (0, 3)"),
        (lambda: MultiStepLR([5, 3]), "milestones is (5, 3); it must be a rising tuple"),
        (lambda: MultiStepLR([0.5]), "milestones is [0.5]; it must be a tuple of whole numbers"),
        (lambda: ExponentialLR(-0.5), "ExponentialLR: gamma is -0.5"),
        (lambda: ExponentialLR(math.inf), "ExponentialLR: gamma is inf"),
        (lambda: CosineAnnealingLR(t_max=0), "CosineAnnealingLR: t_max is 0"),
        (lambda: CosineAnnealingLR(eta_min=-1e-3), "eta_min is -0.001; it must be at least 0"),
        (lambda: PolynomialLR(-1, power=0.0), "total_iters is -1.*; power is 0.0"),
        (lambda: LinearLR(start_factor=-0.1), "LinearLR: start_factor is -0.1; it must be in"),
        (lambda: LinearLR(end_factor=1.5, total_iters=0), "total_iters is 0.*; end_factor is 1.5"),
        (lambda: Warmup(0, Constant()), "Warmup: length is 0"),
        (lambda: Warmup(1, ReduceLROnPlateau()), "then is .*it must be a schedule in closed form"),
        (lambda: OneCycleLR(pct_start=1.1), "OneCycleLR: pct_start is 1.1; it must be in [0, 1]."),
        (lambda: OneCycleLR(anneal_strategy="cosine"), "'cosine'; it must be 'cos' or 'linear'"),
        (lambda: OneCycleLR(max_momentum=1.0), "max_momentum is 1.0"),
        (lambda: OneCycleLR(div_factor=0.0, final_div_factor=-1.0), "div_factor is 0.*; final_div"),
        (lambda: FastaiOneCycle(moms=(0.9, 0.8)), "moms is (0.9, 0.8); it must be 3 numbers"),
        (lambda: FastaiOneCycle(moms=(0.9, 0.8, 1.0)), "it must be three of [0, 1)"),
        (lambda: SlantedTriangular(cut_frac=-0.1, ratio=0.5), "ratio is 0.5.*; cut_frac is -0.1"),
        (lambda: CosineAnnealingWarmRestarts(0, t_mult=0), "t_0 is 0.*; t_mult is 0"),
        (lambda: CosineAnnealingWarmRestarts(T_0=3), "no field 'T_0': did you mean 't_0'?"),
        (lambda: CyclicLR(0, mode="sine"), "step_size_up is 0.*; mode is 'sine'"),
        (lambda: CyclicLR(gamma=0.9), "CyclicLR: gamma needs mode='exp_range'."),
        (lambda: CyclicLR(base_lr=1e-3), "no field 'base_lr': it is the group's learning rate"),
        (lambda: CyclicLR(max_lr=1e-3), "no field 'max_lr': the maximum is the group's learning"),
        (lambda: LambdaLR(stairs), "LambdaLR: function is <function stairs"),
        (lambda: LambdaLR(lr_lambda=stairs), "no field 'lr_lambda': name a function of a module"),
        (lambda: LambdaLR("stairs"), "function is 'stairs': it is written MODULE:FUNCTION"),
        (lambda: LambdaLR("no_such:f"), "'no_such:f', and there is no module 'no_such'"),
        (lambda: LambdaLR("test_schedules:GOLDEN"), "which is not a function but of type"),
        (lambda: LambdaLR("test_schedules:fails"), "fails(0) fails: OSError: no file"),
        (lambda: LambdaLR("test_schedules:wrong_type"), "wrong_type(0) returned '0.1'; it must"),
        (lambda: ReduceLROnPlateau("up"), "ReduceLROnPlateau: mode is 'up'"),
        (lambda: ReduceLROnPlateau(factor=1.0), "factor is 1.0; it must be above 0 and below 1"),
        (lambda: ReduceLROnPlateau(patience=-1, threshold_mode="r"), "patience is -1.*'r'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_schedules_reject_wrong_values(make, message):
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(RecipeError, match=pattern):
        make()
