"""Balance: scikit-learn's weights, and draws with the same odds for each class."""

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
def test_weights_are_scikit_learns(counts):
    from sklearn.utils.class_weight import compute_class_weight

    made = source(*counts)
    expected = compute_class_weight("balanced", classes=np.arange(len(counts)), y=made.targets)
    np.testing.assert_allclose(class_weights(made), expected, rtol=1e-15)
    assert np.mean(np.asarray(class_weights(made))[made.targets]) == pytest.approx(1)


def test_a_class_without_images_weighs_nothing():
    assert class_weights(source(3, 0, 1)) == pytest.approx((2 / 3, 0, 2))


def test_draws_favour_no_class_and_no_image_of_one():
    made = source(900, 90, 10)
    draws = np.concatenate([balanced_draws(made, np.random.default_rng(k)) for k in range(30)])
    assert len(draws) == 30 * len(made)
    assert stats.chisquare(np.bincount(made.targets[draws])).pvalue > 0.001
    of_the_first = np.bincount(draws, minlength=len(made))[:900]
    assert stats.chisquare(of_the_first).pvalue > 0.001
