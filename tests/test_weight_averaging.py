"""`WiSE`: its arguments, and averages of two trees."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft import LinearProbe, RecipeError, Stage, WiSE
from jaxft.weight_averaging import interpolate

START, END = np.random.default_rng(0).standard_normal((2, 50)).astype(np.float32)


@pytest.mark.parametrize("alpha", WiSE().alphas)
def test_interpolate_is_the_weighted_mean(alpha):
    found = interpolate({"w": START, "frozen": None}, {"w": END, "frozen": None}, alpha)
    expected = (1 - alpha) * START.astype(np.float64) + alpha * END
    np.testing.assert_allclose(found["w"], expected, rtol=1e-6, atol=1e-6)
    assert found["frozen"] is None


def test_interpolate_keeps_equal_elements_bit_identical():
    same = jnp.asarray(np.append(START, np.float32(1e-42)))  # XLA may flush a subnormal number
    for alpha in WiSE().alphas:
        np.testing.assert_array_equal(interpolate(same, same, alpha), same)


def test_interpolate_keeps_the_dtype():
    half = jnp.asarray(START, jnp.bfloat16)
    assert interpolate(half, -half, 0.5).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alphas": ()}, "WiSE: alphas is empty; give it at least one"),
        ({"alphas": (0.5, 1.5)}, r"alphas are \(0.5, 1.5\); each must lie between 0 and 1"),
        ({"alphas": (float("nan"),)}, "alphas are .nan,.; each must lie between 0 and 1"),
        ({"alphas": (0.5, 0.5)}, "alphas are .*; each must occur once"),
        ({"alphas": 0.5}, "WiSE: alphas is 0.5; it must be a tuple of numbers"),
        ({"alpha": 0.5}, "WiSE has no field 'alpha': it is called alphas, and is a tuple"),
    ],
    ids=str,
)
def test_wise_rejects_wrong_arguments(arguments, message):
    with pytest.raises(RecipeError, match=message):
        WiSE(**arguments)


@pytest.mark.parametrize(
    ("train", "finish", "message"),
    [
        ({"fc": LinearProbe()}, WiSE(), "a linear probe takes no steps; leave out finish"),
        ({"fc": 1e-3}, 0.5, "Stage 'a': finish is 0.5; it must be WiSE or None"),
    ],
    ids=["linear probe", "number"],
)
def test_stage_rejects_wrong_finish(train, finish, message):
    with pytest.raises(RecipeError, match=message):
        Stage("a", train, None if "LinearProbe" in str(train) else 1, finish=finish)
