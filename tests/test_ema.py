"""`EMA` against a loop in float64, timm's ModelEmaV3 and torch's AveragedModel."""

import importlib.util
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import EMA, RecipeError, Stage

STEPS = 50
# Weights after each step; those of step 0 are the start.
WEIGHTS = np.random.default_rng(0).standard_normal((STEPS + 1, 3))
CASES = {
    "plain": EMA(0.9),
    "every": EMA(0.9, every=4),
    "longer than the run": EMA(0.9, every=STEPS),
    "warmup": EMA(0.9998, warmup=True),
    "warmup that ends": EMA(0.6, warmup=True),
    "both": EMA(0.95, every=3, warmup=True),
}


def averages(ema):
    """Returns the average after each step, by jaxft."""
    after_step = jax.jit(ema.after_step)
    average = ema.start({"w": jnp.asarray(WEIGHTS[0]), "frozen": None}, {})
    trajectory = []
    for weights in WEIGHTS[1:]:
        average = after_step(average, {"w": jnp.asarray(weights), "frozen": None}, {})
        trajectory.append(np.asarray(average[0]["w"]))
    return trajectory


def updates(ema):
    """Yields number of the update, counted from 1, or None, and the weights of each step."""
    for i, weights in enumerate(WEIGHTS[1:]):
        yield (i // ema.every + 1 if i % ema.every == 0 else None), weights


@pytest.mark.parametrize("ema", CASES.values(), ids=CASES)
def test_ema_is_the_average_of_a_loop(ema):
    average, trajectory = WEIGHTS[0], []
    for k, weights in updates(ema):
        if k:
            decay = min(ema.decay, 1 - k ** (-2 / 3)) if ema.warmup else ema.decay
            average = decay * average + (1 - decay) * weights
        trajectory.append(average)
    np.testing.assert_allclose(averages(ema), trajectory, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["warmup", "warmup that ends", "both"])
def test_ema_with_warmup_is_timms(case):
    torch = pytest.importorskip("torch")
    if (package := importlib.util.find_spec("timm")) is None:
        pytest.skip("timm is not installed")
    # This file alone: the package would import all networks.
    timm = runpy.run_path(str(Path(package.origin).parent / "utils" / "model_ema.py"))
    ema = CASES[case]
    module = torch.nn.Linear(3, 1, bias=False)
    module.weight.data[:] = torch.from_numpy(WEIGHTS[:1])
    theirs = timm["ModelEmaV3"](module, decay=ema.decay, use_warmup=True)
    trajectory = []
    for k, weights in updates(ema):
        module.weight.data[0] = torch.from_numpy(weights)
        if k:
            theirs.update(module, step=k)
        trajectory.append(theirs.module.weight[0].detach().clone())
    np.testing.assert_allclose(averages(ema), trajectory, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["plain", "every", "longer than the run"])
def test_ema_every_n_steps_is_torchvisions(case):
    """The loop of `train_one_epoch` with `--model-ema-steps`."""
    torch = pytest.importorskip("torch")
    swa_utils = pytest.importorskip("torch.optim.swa_utils")
    ema = CASES[case]
    module = torch.nn.Linear(3, 1, bias=False)
    module.weight.data[:] = torch.from_numpy(WEIGHTS[:1])
    theirs = swa_utils.AveragedModel(
        module, avg_fn=lambda average, x, _: ema.decay * average + (1 - ema.decay) * x
    )
    theirs.n_averaged.fill_(1)  # the copy that it begins with counts
    trajectory = []
    for i, weights in enumerate(WEIGHTS[1:]):
        module.weight.data[0] = torch.from_numpy(weights)
        if i % ema.every == 0:
            theirs.update_parameters(module)
        trajectory.append(theirs.module.weight[0].detach().clone())
    np.testing.assert_allclose(averages(ema), trajectory, rtol=1e-5, atol=1e-6)


def test_ema_with_warmup_begins_with_an_exact_copy():
    first, second = averages(EMA(0.9998, every=2, warmup=True))[:2]
    np.testing.assert_array_equal(first, np.float32(WEIGHTS[1]))
    np.testing.assert_array_equal(second, first)


@pytest.mark.parametrize("ema", CASES.values(), ids=CASES)
def test_ema_of_weights_that_stand_still_is_bit_identical(ema):
    start = jnp.linspace(0.1, 0.9, 100)
    average = ema.start({"w": start}, {"mean": start})
    for _ in range(20):
        average = jax.jit(ema.after_step)(average, {"w": start}, {"mean": start})
    for tree in average[:2]:
        jax.tree.map(lambda x: np.testing.assert_array_equal(x, start), tree)


def test_number_as_ema_is_its_short_form():
    plain, short = (Stage("a", {"*": 1.0}, 1, ema=ema) for ema in (EMA(0.9), 0.9))
    assert plain.averaging == short.averaging == EMA(0.9)
    assert Stage("a", {"*": 1.0}, 1).averaging is None
    assert len(EMA(0.9).start({}, {})) == 2  # without a number of steps


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": 1.0}, "EMA: decay is 1.0; a decay lies between 0 and 1"),
        ({"decay": float("nan"), "every": 0}, "decay is nan; .*; every is 0; it must be at least"),
        ({"decay": 0.9, "every": 2.5}, "every is 2.5; it must be a whole number"),
        ({"decay": 0.9, "warmup": 100}, "warmup is 100; it must be True or False"),
        ({"decay": 0.9, "steps": 32}, "EMA has no field 'steps': it is called every"),
        ({}, "EMA: decay must be given"),
    ],
    ids=str,
)
def test_ema_rejects_wrong_arguments(arguments, message):
    with pytest.raises(RecipeError, match=message):
        EMA(**arguments)
