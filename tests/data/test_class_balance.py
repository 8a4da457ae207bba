"""Class balance: weights equal scikit-learn's, and draws favour no class."""

import numpy as np
import pytest
from scipy import stats

from jaxft.data import arrays
from jaxft.data.class_balance import balanced_draws, class_weights


def source(*counts):
    targets = np.repeat(np.arange(len(counts)), counts)
    images = np.zeros((len(targets), 8, 8, 1), np.uint8)
    return arrays(images, targets, [f"class {k}" for k in range(len(counts))])


@pytest.mark.parametrize("counts", [(5,), (4, 4), (6, 3, 1)], ids=str)
def test_class_weights_equal_scikit_learn(counts):
    from sklearn.utils.class_weight import compute_class_weight

    images = source(*counts)
    expected = compute_class_weight("balanced", classes=np.arange(len(counts)), y=images.targets)
    np.testing.assert_allclose(class_weights(images), expected, rtol=1e-15)
    assert np.mean(np.asarray(class_weights(images))[images.targets]) == pytest.approx(1)


def test_class_weights_of_empty_class_is_zero():
    assert class_weights(source(3, 0, 1)) == pytest.approx((2 / 3, 0, 2))


def test_balanced_draws_are_uniform_over_classes_and_their_images():
    images = source(900, 90, 10)
    draws = np.concatenate([balanced_draws(images, np.random.default_rng(k)) for k in range(30)])
    assert len(draws) == 30 * len(images)
    assert stats.chisquare(np.bincount(images.targets[draws])).pvalue > 0.001
    first_class_counts = np.bincount(draws, minlength=len(images))[:900]
    assert stats.chisquare(first_class_counts).pvalue > 0.001
