"""`BatchNorm` against torch's formulas in float64 NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import batch_norm, create
from jaxft.models.batch_norm import BatchNorm
from jaxft.models.context import Context

SHAPE = (4, 3, 2, 5)
X = np.random.default_rng(0).normal(2.0, 3.0, SHAPE)
SCALE, BIAS, MEAN, VAR = np.random.default_rng(1).uniform(0.5, 2.0, (4, SHAPE[-1]))


@pytest.fixture(params=["on CPU", "on TPU", "on GPU"])
def passes(request, monkeypatch):
    """Reads the batch as on this platform."""
    if request.param == "on TPU":
        monkeypatch.setattr(batch_norm, "_statistics", batch_norm._one_pass)
    elif request.param == "on GPU":

        def shifted(x, mask, guess, eps):
            return batch_norm._shifted_by_row(x, mask, guess)

        monkeypatch.setattr(batch_norm, "_statistics", shifted)


def norm(dtype=jnp.float32) -> BatchNorm:
    layer = BatchNorm(SHAPE[-1])
    for name, value in (("scale", SCALE), ("bias", BIAS), ("mean", MEAN), ("var", VAR)):
        setattr(layer, name, type(getattr(layer, name))(jnp.asarray(value, dtype)))
    return layer


def expected(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output, running mean and running variance, as in torch's documentation."""
    values = x[rows].reshape(-1, x.shape[-1])
    mean, biased, n = values.mean(0), values.var(0), len(values)
    y = SCALE * (x - mean) / np.sqrt(biased + 1e-5) + BIAS
    return y, 0.9 * MEAN + 0.1 * mean, 0.9 * VAR + 0.1 * biased * n / (n - 1)


MASKS = {
    "no mask": None,
    "whole batch": [True, True, True, True],
    "padded at the end": [True, True, True, False],
    "holes": [False, True, False, True],
    "one row": [False, False, True, False],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.usefixtures("passes")
def test_batch_norm_batch_mode_equals_torch(mask, jit):
    def run(x, mask):
        layer = norm()
        return layer(x, Context("batch", mask)), layer.mean[...], layer.var[...]

    rows = np.ones(4, bool) if mask is None else np.array(mask)
    x = np.where(rows[:, None, None, None], X, 1e6)  # padding values must not matter
    run = jax.jit(run) if jit else run
    y, mean, var = run(jnp.asarray(x, jnp.float32), None if mask is None else jnp.asarray(rows))
    y_, mean_, var_ = expected(x, rows)
    np.testing.assert_allclose(y[rows], y_[rows], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(mean, mean_, rtol=1e-6)
    np.testing.assert_allclose(var, var_, rtol=1e-6)


def test_batch_norm_running_mode_equals_torch_and_keeps_statistics():
    layer = norm()
    before = layer.mean[...], layer.var[...]
    y = layer(jnp.asarray(X, jnp.float32), Context("running"))
    np.testing.assert_allclose(
        y, SCALE * (X - MEAN) / np.sqrt(VAR + 1e-5) + BIAS, rtol=1e-5, atol=1e-5
    )
    assert layer.mean[...] is before[0]
    assert layer.var[...] is before[1]


def test_batch_norm_batch_fixed_mode_keeps_statistics():
    updating, fixed, x = norm(), norm(), jnp.asarray(X, jnp.float32)
    before = fixed.mean[...], fixed.var[...]
    y = fixed(x, Context("batch_fixed"))
    np.testing.assert_array_equal(y, updating(x, Context("batch")))
    assert fixed.mean[...] is before[0]
    assert fixed.var[...] is before[1]


def test_batch_norm_batch_replace_mode_forgets_the_old_statistics():
    updating, replacing, x = norm(), norm(), jnp.asarray(X, jnp.float32)
    y = replacing(x, Context("batch_replace"))
    np.testing.assert_array_equal(y, updating(x, Context("batch")))
    values = X.reshape(-1, SHAPE[-1])
    np.testing.assert_allclose(replacing.mean[...], values.mean(0), rtol=1e-5)
    np.testing.assert_allclose(replacing.var[...], values.var(0, ddof=1), rtol=1e-5)


def test_batch_norm_of_vectors_equals_batch_norm_1d():
    layer, x = norm(), X[:, 0, 0]
    y = layer(jnp.asarray(x, jnp.float32), Context("batch"))
    y_, mean_, var_ = expected(x, np.ones(4, bool))
    np.testing.assert_allclose(y, y_, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.mean[...], mean_, rtol=1e-6)
    np.testing.assert_allclose(layer.var[...], var_, rtol=1e-6)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("rows", [[True] * 4, [True, True, True, False]], ids=["whole", "padded"])
def test_batch_norm_replicas_have_separate_statistics_and_the_first_updates_running_ones(rows):
    rows, layer = np.array(rows), norm()
    mask = None if rows.all() else jnp.asarray(rows)
    y = layer(jnp.asarray(X, jnp.float32), Context("batch", mask, replicas=2))
    for part in (slice(0, 2), slice(2, 4)):
        y_, _, _ = expected(X[part], rows[part])
        np.testing.assert_allclose(y[part][rows[part]], y_[rows[part]], rtol=1e-5, atol=1e-5)
    _, mean_, var_ = expected(X[:2], rows[:2])
    np.testing.assert_allclose(layer.mean[...], mean_, rtol=1e-6)
    np.testing.assert_allclose(layer.var[...], var_, rtol=1e-6)


@pytest.mark.usefixtures("passes")
@pytest.mark.parametrize("rows", [[False] * 4, [True, False, False, False]], ids=["none", "one"])
def test_batch_norm_keeps_statistics_with_fewer_than_two_values(rows):
    layer = norm()
    x = jnp.asarray(X, jnp.float32)[:, :1, :1]  # one value a row
    y = layer(x, Context("batch", jnp.array(rows)))
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(layer.mean[...], MEAN.astype(np.float32))
    np.testing.assert_array_equal(layer.var[...], VAR.astype(np.float32))


@pytest.mark.slow
def test_batch_norm_gradients_ignore_padding():
    def loss(x, mask):
        y = norm()(x, Context("batch", mask))
        return jnp.where(mask[:, None, None, None], jnp.sin(y), 0).sum()

    mask = jnp.array([True, True, True, False])
    x = jnp.asarray(X, jnp.float32)
    gradient = jax.grad(loss)(x, mask)
    unpadded = jax.grad(loss)(x[:3], mask[:3])
    np.testing.assert_allclose(gradient[:3], unpadded, atol=1e-6)
    np.testing.assert_array_equal(gradient[3], 0)


@pytest.mark.slow
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("rows", [[True] * 4, [True, False, True, True]], ids=["whole", "holes"])
@pytest.mark.usefixtures("passes")
def test_batch_norm_gradients_equal_the_formulas(rows, replicas):
    """Includes the gradients through batch statistics, padding rows and running statistics."""
    mask, weights = np.array(rows), np.random.default_rng(2).normal(size=SHAPE)

    def ours(x, scale, bias):
        layer = norm(jnp.float64)
        layer.scale[...], layer.bias[...] = scale, bias
        y = layer(x, Context("batch", jnp.asarray(mask), replicas=replicas))
        return (jnp.sin(y) * weights).sum() + running_loss(layer.mean[...], layer.var[...])

    def running_loss(mean, var):
        return 10 * (jnp.sin(mean) - jnp.cos(var)).sum()

    def formula(x, scale, bias):
        values = x[: 4 // replicas][mask[: 4 // replicas]].reshape(-1, SHAPE[-1])
        unbiased = values.var(0, ddof=1)
        total = running_loss(0.9 * MEAN + 0.1 * values.mean(0), 0.9 * VAR + 0.1 * unbiased)
        for part in np.split(np.arange(4), replicas):
            values = x[part[mask[part]]].reshape(-1, SHAPE[-1])
            y = (x[part] - values.mean(0)) / jnp.sqrt(values.var(0) + 1e-5) * scale + bias
            total += (jnp.sin(y) * weights[part]).sum()
        return total

    with jax.enable_x64(True):
        arguments = tuple(map(jnp.asarray, (X, SCALE, BIAS)))
        actual, expected = (jax.grad(f, (0, 1, 2))(*arguments) for f in (ours, formula))
        for a, b in zip(actual, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_batch_norm_gradient_saves_memory(monkeypatch):
    """Compares the memory of a whole training step with and without the custom gradient."""
    model = create("cifar_resnet8", num_classes=2)
    trees = jax.eval_shape(model.init, jax.random.key(0))
    images = jax.ShapeDtypeStruct((16, 32, 32, 3), jnp.float32)

    def step_memory():
        def loss(params, stats, images):
            return model.apply(params, stats, images, norms="batch")[0].sum()

        compiled = jax.jit(jax.grad(loss)).lower(*trees, images).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def plain(*args):
        return batch_norm._forward(*args)[0]

    custom_gradient = step_memory()
    monkeypatch.setattr(batch_norm, "_normalize", plain)
    assert custom_gradient < 0.75 * step_memory()


@pytest.mark.usefixtures("passes")
def test_batch_norm_half_precision_input_keeps_float32_statistics():
    layer = norm()
    x = jnp.asarray(X, jnp.bfloat16)
    y = layer(x, Context("batch"))
    y_, mean_, var_ = expected(np.asarray(x, np.float64), np.ones(4, bool))
    assert (y.dtype, layer.mean[...].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(np.asarray(y, np.float64), y_, rtol=1e-2, atol=1e-2)
    np.testing.assert_allclose(layer.mean[...], mean_, rtol=1e-6)
    np.testing.assert_allclose(layer.var[...], var_, rtol=1e-6)


@pytest.mark.usefixtures("passes")
def test_batch_norm_float64():
    with jax.enable_x64(True):
        layer = norm(jnp.float64)
        y = layer(jnp.asarray(X), Context("batch"))
        assert y.dtype == layer.var[...].dtype == jnp.float64
        for ours, theirs in zip(
            (y, layer.mean[...], layer.var[...]), expected(X, np.ones(4, bool)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)


ERRORS = {
    "unknown mode": (X, Context("eval"), "'running', 'batch', .*, not 'eval'"),
    "one value per channel": (X[:1, :1, :1], Context("batch"), "more than one value"),
    "one in each replica": (X[:, :1, :1], Context("batch", replicas=4), "more than one value"),
    "uneven replicas": (X, Context("batch", replicas=3), "a batch of 4 .* among 3 replicas"),
}


@pytest.mark.parametrize(("x", "context", "message"), ERRORS.values(), ids=ERRORS)
def test_batch_norm_errors(x, context, message):
    with pytest.raises(ValueError, match=message):
        norm()(jnp.asarray(x, jnp.float32), context)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("mean", "std", "guess", "rtol"),
    [
        (1e3, 1.0, 999.0, 1e-5),
        (1e3, 1.0, 0.0, 1e-5),
        (1e3, 0.1, 0.0, 1e-4),
        (-3.0, 2.0, 0.0, 1e-5),
        (0.0, 1e-3, 1e3, 1e-5),
        (0.0, 0.0, 0.0, 0.0),
        (5.0, 0.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize("padding", [0, 3])
def test_batch_norm_one_pass_does_not_lose_digits(mean, std, guess, rtol, jit, padding):
    """Also where the running mean is far away, as in a new network."""
    x = np.random.default_rng(0).normal(mean, std, (2, 8, 6, 6, 3)).astype(np.float32)
    x[1] += 10 * std  # the parts have their own statistics
    mask = np.array([[True] * 8, [True] * (8 - padding) + [False] * padding])
    read_once = partial(batch_norm._one_pass, eps=1e-5)
    read_once = jax.jit(read_once) if jit else read_once
    means, variances, counts = read_once(x, mask, jnp.full(3, guess, jnp.float32))
    for part in range(2):
        values = x[part][mask[part]].reshape(-1, 3).astype(np.float64)
        assert counts[part] == len(values)
        np.testing.assert_allclose(means[part], values.mean(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(variances[part], values.var(0), rtol=rtol, atol=0)


def test_batch_norm_one_pass_reads_again_only_where_digits_cancel():
    """In float32, the mean of 1e3 leaves no digit of a variance of 1e-3."""
    x = np.random.default_rng(0).normal(1e3, 0.03, (1, 8, 6, 6, 3)).astype(np.float32)
    mask, guess = np.ones((1, 8), bool), jnp.zeros(3)
    exact = x.astype(np.float64).var((0, 1, 2, 3))
    read_once = partial(batch_norm._one_pass, eps=1e-5)
    np.testing.assert_allclose(read_once(x, mask, guess)[1][0], exact, rtol=1e-2)
    jaxpr = jax.make_jaxpr(read_once)(x, mask, guess)
    (conditional,) = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    again, once = (b.jaxpr.eqns for b in reversed(conditional.params["branches"]))
    assert any(e.primitive.name == "reduce_sum" for e in again)
    assert not any(e.primitive.name == "reduce_sum" for e in once)


def test_batch_norm_one_pass_keeps_nan():
    x = jnp.ones((1, 4, 2, 2, 3)).at[0, 0, 0, 0, 0].set(jnp.nan)
    mean, var, _ = batch_norm._one_pass(x, jnp.ones((1, 4), bool), jnp.zeros(3), 1e-5)
    np.testing.assert_array_equal(np.isnan(mean[0]), [True, False, False])
    np.testing.assert_array_equal(np.isnan(var[0]), [True, False, False])


@pytest.mark.parametrize(
    ("mean", "std", "first", "rtol"),
    [(0.0, 1.0, 0.0, 1e-5), (1e3, 0.03, 0.0, 1e-4), (1e3, 1.0, 50.0, 1e-4), (5.0, 0.0, 0.0, 0.0)],
)
def test_batch_norm_shifted_by_row_does_not_lose_digits(mean, std, first, rtol):
    """Also where the first row is the only one that differs."""
    x = np.random.default_rng(0).normal(mean, std, (2, 8, 6, 6, 3)).astype(np.float32)
    x[:, 0] += first
    mask = np.array([[True] * 8, [True] * 5 + [False] * 3])
    means, variances, counts = jax.jit(batch_norm._shifted_by_row)(x, mask, jnp.zeros(3))
    for part in range(2):
        values = x[part][mask[part]].reshape(-1, 3).astype(np.float64)
        assert counts[part] == len(values)
        np.testing.assert_allclose(means[part], values.mean(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(variances[part], values.var(0), rtol=rtol, atol=1e-9)
