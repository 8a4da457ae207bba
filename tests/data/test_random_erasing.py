"""Random erasing: pixels equal torchvision's for the same box; boxes have its distribution."""

from functools import partial
from unittest import mock

import jax
import numpy as np
import pytest
from reference import torchvision_transforms
from scipy import stats

from jaxft.data.random_erasing import erase, erasing_boxes

SHAPE = (60, 80)


def images():
    return np.random.default_rng(0).normal(size=(5, 9, 7, 3)).astype(np.float32) + 3


BOXES = [(0, 0, 3, 2), (5, 1, 4, 6), (8, 6, 1, 1), (2, 3, 0, 0), (4, 0, 2, 0)]


def test_random_erasing_erases_boxes_only():
    expected = images()
    for image, (top, left, h, w) in zip(expected, BOXES, strict=True):
        image[top : top + h, left : left + w] = 0
    np.testing.assert_array_equal(jax.jit(erase)(images(), np.array(BOXES)), expected)


def test_random_erasing_equals_torchvision_live():
    random_erasing = torchvision_transforms().RandomErasing
    import torch

    erased = np.asarray(erase(images(), np.array(BOXES)))
    for image, box, actual in zip(images(), BOXES, erased, strict=True):
        params = (*box, torch.zeros(1, 1, 1))
        with mock.patch.object(random_erasing, "get_params", return_value=params):
            expected = random_erasing(p=1)(torch.from_numpy(image).permute(2, 0, 1))
        np.testing.assert_array_equal(actual, expected.permute(1, 2, 0).numpy())


COUNT = 4000
erasing_boxes_jit = jax.jit(partial(erasing_boxes, count=COUNT, height=60, width=80))


def draw(seed=0, *, probability=0.5, scale=(0.02, 0.33)):
    """Returns the boxes of `COUNT` images, [count 4]."""
    return np.asarray(erasing_boxes_jit(jax.random.key(seed), probability=probability, scale=scale))


def reference_boxes(count, rng):
    """Returns boxes [count 4] by an independent implementation in NumPy."""
    area = 60 * 80 * rng.uniform(0.02, 0.33, (count, 10))
    aspect = np.exp(rng.uniform(np.log(0.3), np.log(3.3), (count, 10)))
    h, w = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (h < 60) & (w < 80)
    assert fits.any(axis=1).all()
    first = np.arange(count), fits.argmax(axis=1)
    h, w = h[first], w[first]
    top = np.floor(rng.uniform(size=count) * (60 - h + 1))
    left = np.floor(rng.uniform(size=count) * (80 - w + 1))
    return np.stack([top, left, h, w], axis=1)


def assert_same_distribution(boxes, other_boxes):
    names = ("top", "left", "height", "width")
    for name, a, b in zip(names, boxes.T, other_boxes.T, strict=True):
        assert stats.ks_2samp(a, b).pvalue > 0.01, name


def test_random_erasing_boxes_are_distributed_as_reference():
    boxes = draw(probability=1.0)
    assert_same_distribution(boxes, reference_boxes(COUNT, np.random.default_rng(0)))
    top, left, h, w = boxes.T
    assert (np.minimum(top, left) >= 0).all()
    assert (top + h <= 60).all()
    assert (left + w <= 80).all()


def test_random_erasing_boxes_are_distributed_as_torchvision_live():
    random_erasing = torchvision_transforms().RandomErasing
    import torch

    torch.manual_seed(0)
    image = torch.zeros(3, *SHAPE)
    params = [
        random_erasing.get_params(image, (0.02, 0.33), (0.3, 3.3), [0.0]) for _ in range(COUNT)
    ]
    assert_same_distribution(draw(probability=1.0), np.array([box for *box, _ in params]))


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_random_erasing_probability(probability):
    count = np.count_nonzero(draw(probability=probability)[:, 2:].all(axis=1))
    assert stats.binomtest(count, COUNT, probability).pvalue > 0.01


def test_random_erasing_without_fitting_box():
    assert not draw(probability=1.0, scale=(1.5, 2.0))[:, 2:].any()


def test_random_erasing_depends_on_the_key_alone():
    np.testing.assert_array_equal(draw(0), draw(0))
    assert (draw(0) != draw(1)).any()
