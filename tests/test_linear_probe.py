"""Logistic regression against scikit-learn, and absent classes."""

import re
import warnings

import jax
import numpy as np
import pytest

from jaxft import DataError, LinearProbe, RecipeError, linear_probe, logistic_regression

C = (1e-3, 1.0, 30.0)


def examples(n, d, k, condition=1.0, noise=1.0):
    """Returns features around 3, as pooled features are not around 0, and their classes."""
    rng = np.random.default_rng(n)
    scale = np.geomspace(1, 1 / condition, d)
    directions = rng.normal(size=(n, d))
    logits = directions @ rng.normal(size=(d, k)) + noise * rng.normal(size=(n, k))
    return 3 + directions * scale, logits.argmax(1)


def scikit_learn_fit(features, targets, c, solver):
    """Returns kernel [d k] and bias [k]; for two classes, of the second against the first."""
    from sklearn.linear_model import LogisticRegression as Original

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its lbfgs warns when it misses the tolerance
        fit = Original(C=c, tol=1e-10, max_iter=5000, solver=solver).fit(features, targets)
    return fit.coef_.T, fit.intercept_


def assert_equals(fit, expected, atol):
    kernel, bias = fit.kernel, fit.bias
    if expected[0].shape[1] == 1:
        np.testing.assert_allclose(kernel[:, 0], -kernel[:, 1], rtol=0, atol=1e-9)
        kernel, bias = kernel[:, 1:] - kernel[:, :1], bias[1:] - bias[:1]
    np.testing.assert_allclose(kernel, expected[0], rtol=0, atol=atol)
    np.testing.assert_allclose(bias, expected[1], rtol=0, atol=10 * atol)


CASES = {
    "two classes": ((60, 8, 2), "newton-cholesky", 1e-6),
    "five classes": ((60, 8, 5), "newton-cholesky", 1e-6),
    "more features than images": ((40, 70, 2), "newton-cholesky", 1e-6),
    "ill-conditioned": ((60, 8, 5, 1e4), "newton-cholesky", 1e-6),
    "two classes, by its default solver": ((60, 8, 2), "lbfgs", 1e-4),
    "five classes, by its default solver": ((60, 8, 5, 1, 9), "lbfgs", 1e-4),
}


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "solver", "atol"), CASES.values(), ids=CASES)
def test_logistic_regression_equals_scikit_learn(shape, solver, atol):
    features, targets = examples(*shape)
    strengths = C[:2] if solver == "lbfgs" else C  # weak penalties take it thousands of steps
    fits = logistic_regression(features, targets, shape[2], c=strengths)
    for c, fit in zip(strengths, fits, strict=True):
        assert (fit.c, fit.converged) == (c, True)
        assert_equals(fit, scikit_learn_fit(features, targets, c, solver), atol)


def test_logistic_regression_fits_do_not_depend_on_the_other_strengths():
    features, targets = examples(60, 8, 2)
    fits = logistic_regression(features, targets, 2, c=(30.0, 1e-3, 30.0))
    assert [fit.c for fit in fits] == [30.0, 1e-3, 30.0]
    (alone,) = logistic_regression(features, targets, 2, c=(30.0,))
    np.testing.assert_allclose(alone.kernel, fits[0].kernel, rtol=0, atol=1e-7)


def test_logistic_regression_is_float64():
    features, targets = examples(60, 8, 2)
    (fit,) = logistic_regression(features.astype(np.float32), targets.astype(np.int32), 2)
    assert (fit.kernel.dtype, fit.bias.dtype) == (np.float64, np.float64)
    assert jax.numpy.zeros(1).dtype == np.float32


@pytest.mark.parametrize("k", [3, 6])
def test_logistic_regression_with_an_absent_class(k):
    """The fit of the other classes does not change."""
    features, targets = examples(60, 8, k - 1)
    numbers = np.delete(np.arange(k), 1)
    (fit,) = logistic_regression(features, numbers[targets], k)
    (without,) = logistic_regression(features, targets, k - 1)
    np.testing.assert_array_equal(fit.kernel[:, numbers], without.kernel)
    np.testing.assert_array_equal(fit.bias[numbers], without.bias)
    np.testing.assert_array_equal(fit.kernel[:, 1], 0)
    probabilities = np.exp(features @ fit.kernel + fit.bias)
    probabilities /= probabilities.sum(1, keepdims=True)
    assert probabilities[:, 1].max() == pytest.approx(1 / 62)


def test_logistic_regression_of_one_example():
    (fit,) = logistic_regression(np.ones((1, 3)), [1], 2)
    np.testing.assert_array_equal(fit.kernel, 0)
    assert np.exp(fit.bias[0] - fit.bias[1]) == pytest.approx(1 / 2)
    assert fit.converged


def test_logistic_regression_reports_that_it_has_not_converged(monkeypatch):
    monkeypatch.setattr(linear_probe, "ITERATIONS", 2)
    features, targets = examples(61, 8, 2)  # a new shape, so that it is compiled again
    (fit,) = logistic_regression(features, targets, 2)
    assert (fit.iterations, fit.converged) == (2, False)


ERRORS = {
    "no matrix": (np.ones(3), [0, 1, 1], "features are [3] and targets [3]; they must be [n d]"),
    "other rows": (np.ones((3, 2)), [0, 1], "features are [3, 2] and targets [2]"),
    "empty": (np.ones((0, 2)), [], "features are [0, 2]"),
    "class": (np.ones((2, 2)), [0, 2], "targets are from 0 to 2; 2 classes are numbered from 0"),
    "infinite": ([[0.0], [np.inf]], [0, 1], "1 of 2 rows of features are not finite, such as ro"),
}


@pytest.mark.parametrize(("features", "targets", "message"), ERRORS.values(), ids=ERRORS)
def test_logistic_regression_rejects_wrong_arrays(features, targets, message):
    with pytest.raises(DataError, match=re.escape(message)):
        logistic_regression(features, targets, 2)


@pytest.mark.parametrize("c", [(), (0.0,), (1.0, -1.0), (float("inf"),), (float("nan"),)], ids=str)
def test_logistic_regression_rejects_wrong_strengths(c):
    with pytest.raises(RecipeError, match=re.escape(f"c is {c}; it must be")):
        LinearProbe(c)
    with pytest.raises(RecipeError, match=re.escape(f"c is {c}; it must be")):
        logistic_regression(np.ones((2, 1)), [0, 1], 2, c=c)
