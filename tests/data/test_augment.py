"""Colour jitter and policies: pixels and distributions equal torchvision's."""

from itertools import permutations
from unittest import mock

import numpy as np
import pytest
from reference import digest, recorded, sample, torchvision_transforms
from scipy import stats

from jaxft.data import Preprocessing, autoaugment
from jaxft.data.augment import VIEWS
from jaxft.data.autoaugment import OPERATIONS, RandAugment, TrivialAugmentWide
from jaxft.data.color import ColorJitter, adjust
from jaxft.data.geometry import random_crop_box
from jaxft.data.preprocessing import train_view
from jaxft.errors import DataError

# Colour changes: channels and factors, in order.
COLORS = {
    "darker": [("brightness", 0.6)],
    "brighter": [("brightness", 1.4)],
    "black": [("brightness", 0.0)],
    "flatter": [("contrast", 0.37)],
    "harsher": [("contrast", 1.9)],
    "paler": [("saturation", 0.25)],
    "gaudier": [("saturation", 1.75)],
    "hue, half": [("hue", 0.5)],
    "hue, back": [("hue", -0.31)],
    "hue, forth": [("hue", 0.1)],
    "all": [("hue", 0.05), ("contrast", 0.8), ("brightness", 1.3), ("saturation", 0.9)],
    "all, otherwise": [("saturation", 0.9), ("brightness", 1.3), ("contrast", 0.8), ("hue", 0.05)],
}
CHANNELS = ("brightness", "contrast", "saturation", "hue")
SIZES = [(37, 53), (48, 48), (61, 40)]

# Policies: class, index of the operation, interpolation.
POLICIES = {
    f"{policy.__name__}, {name}, {interpolation}": (policy, k, interpolation)
    for policy in (RandAugment, TrivialAugmentWide)
    for k, name in enumerate(OPERATIONS)
    for interpolation in ("bilinear", "nearest")
    if interpolation == "bilinear" or name in ("ShearY", "TranslateX", "Rotate")
}


def random_numbers(policy, operation):
    """Returns sequences of random integers that make a policy draw the operation.

    Each draw takes the operation, its magnitude (TrivialAugment) and its sign, if it has one.
    """
    if policy is TrivialAugmentWide:
        return [[operation, m, s] for m in (0, 7, 15, 22, 30) for s in (0, 1)]
    operations = (operation, (operation + 5) % len(OPERATIONS))
    return [
        [n for k in operations for n in ((k, s) if OPERATIONS[k] in autoaugment._SIGNED else (k,))]
        for s in (0, 1)
    ]


class FixedGenerator:
    """A random generator that returns given integers."""

    def __init__(self, numbers):
        self._numbers = iter(numbers)

    def integers(self, high):
        number = next(self._numbers)
        assert 0 <= number < high
        return number


def our_color(changes):
    images = [sample(*size) for size in SIZES]
    for channel, factor in changes:
        images = [adjust(image, channel, factor) for image in images]
    return images


def torchvision_color(changes):
    jitter = torchvision_transforms().ColorJitter
    factors = dict(changes)
    order = [CHANNELS.index(channel) for channel, _ in changes]
    params = (order, *(factors.get(channel) for channel in CHANNELS))
    with mock.patch.object(jitter, "get_params", return_value=params):
        return [jitter(0.5)(sample(*size)) for size in SIZES]


def our_policy(policy_class, index, interpolation):
    policy = policy_class(interpolation=interpolation)
    images = []
    for size in SIZES:
        for numbers in random_numbers(policy_class, index):
            image = sample(*size)
            for operation in policy.draw(*size, FixedGenerator(numbers)):
                image = autoaugment.apply(image, operation, interpolation)
            images.append(image)
    return images


def torchvision_policy(policy_class, index, interpolation):
    tv = torchvision_transforms()
    import torch

    policy = getattr(tv, policy_class.__name__)(interpolation=tv.InterpolationMode(interpolation))
    images = []
    for size in SIZES:
        for numbers in random_numbers(policy_class, index):
            with mock.patch("torch.randint", side_effect=map(torch.tensor, numbers)):
                images.append(policy(sample(*size)))
    return images


CASES = {
    **{name: (our_color, torchvision_color, (changes,)) for name, changes in COLORS.items()},
    **{name: (our_policy, torchvision_policy, case) for name, case in POLICIES.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_augment_equals_torchvision_recorded(case):
    function, _, arguments = CASES[case]
    assert digest(*function(*arguments)) == recorded("transforms_augment.npz")[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_augment_equals_torchvision_live(case):
    function, torchvision_function, arguments = CASES[case]
    for actual, expected in zip(
        function(*arguments), torchvision_function(*arguments), strict=True
    ):
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("count", [2, 3, 7, 10, 31, 100])
def test_autoaugment_magnitudes_equal_torch_live(count):
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("without AVX2, torch rounds differently")
    for start, stop in [(0, 0.3), (0, 32), (255, 0), *((0, 150 / 331 * n) for n in range(24, 600))]:
        expected = torch.linspace(start, stop, count).numpy()
        np.testing.assert_array_equal(autoaugment._linspace(start, stop, count), expected)


# Distributions.


def test_trivialaugment_operations_magnitudes_and_signs_are_uniform():
    rng = np.random.default_rng(0)
    policy = TrivialAugmentWide()
    operations = [policy.draw(32, 32, rng)[0] for _ in range(10_000)]
    names, counts = np.unique([name for name, _ in operations], return_counts=True)
    assert set(names) == set(OPERATIONS)
    assert stats.chisquare(counts).pvalue > 0.01
    angles = np.array([magnitude for name, magnitude in operations if name == "Rotate"])
    magnitudes, counts = np.unique(np.abs(angles), return_counts=True)
    np.testing.assert_allclose(magnitudes, np.linspace(0, 135, 31), rtol=1e-6)
    assert stats.chisquare(counts).pvalue > 0.01
    assert stats.binomtest(np.sum(angles > 0), np.count_nonzero(angles)).pvalue > 0.01


def test_randaugment_pairs_of_operations_are_uniform():
    rng = np.random.default_rng(0)
    policy = RandAugment()
    pairs = [tuple(name for name, _ in policy.draw(32, 32, rng)) for _ in range(10_000)]
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(pairs) == len(OPERATIONS) ** 2
    assert stats.chisquare(counts).pvalue > 0.01


def test_color_jitter_factors_and_order_are_uniform():
    rng = np.random.default_rng(0)
    jitter = ColorJitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    draws = [jitter.draw(rng) for _ in range(10_000)]
    orders = [tuple(channel for channel, _ in changes) for changes in draws]
    assert set(orders) == set(permutations(CHANNELS))
    assert stats.chisquare(np.unique(orders, axis=0, return_counts=True)[1]).pvalue > 0.01
    ranges = {"brightness": (0.6, 1.4), "contrast": (0, 2.5), "saturation": (0.8, 1.2)}
    for channel, (low, high) in {**ranges, "hue": (-0.1, 0.1)}.items():
        factors = [dict(changes)[channel] for changes in draws]
        assert stats.kstest(factors, stats.uniform(low, high - low).cdf).pvalue > 0.01


def test_color_jitter_of_0_changes_nothing():
    changes = ColorJitter(hue=0.1).draw(np.random.default_rng(0))
    assert [channel for channel, _ in changes] == ["hue"]
    assert ColorJitter().draw(np.random.default_rng(0)) == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ColorJitter(hue=0.6), r"Jitter\(.*hue=0.6\): .*hue above 0.5"),
        (lambda: ColorJitter(contrast=-0.1), "contrast=-0.1.*none may be negative"),
        (lambda: RandAugment(magnitude=31), "magnitude=31.*must lie in 0..30"),
        (lambda: RandAugment(magnitude=-1), "magnitude=-1.*must lie in 0..30"),
    ],
)
def test_augment_argument_out_of_range(make, message):
    with pytest.raises(DataError, match=message):
        make()


# Whole views.


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["crop_flip", "jitter", "randaugment", "trivialaugment"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_augment_view_equals_torchvision_composition_live(augment, interpolation):
    functional = torchvision_transforms().functional
    mode = torchvision_transforms().InterpolationMode(interpolation)
    preprocessing = Preprocessing(image_size=24, interpolation=interpolation)
    image, flips = sample(37, 53), 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        box = random_crop_box(37, 53, rng)
        expected = functional.resized_crop(image, *box, [24, 24], mode)
        if rng.random() < 0.5:
            expected, flips = functional.hflip(expected), flips + 1
        if augment == "jitter":
            for channel, factor in VIEWS[augment].color_jitter.draw(rng):
                expected = getattr(functional, f"adjust_{channel}")(expected, factor)
        elif augment != "crop_flip":
            operations = VIEWS[augment].policy.draw(24, 24, rng)
            apply = torchvision_transforms().autoaugment._apply_op
            bilinear = torchvision_transforms().InterpolationMode("bilinear")
            for operation in operations:
                expected = apply(expected, *operation, interpolation=bilinear, fill=None)
        view = train_view(image, preprocessing, augment, np.random.default_rng(seed))
        np.testing.assert_array_equal(view, expected)
    assert 0 < flips < 20


def test_train_view_uses_interpolation():
    image = sample(61, 40)
    views = [
        train_view(
            image,
            Preprocessing(image_size=24, resize_size=28, interpolation=interpolation),
            "crop_flip",
            np.random.default_rng(0),
        )
        for interpolation in ("bilinear", "bicubic")
    ]
    assert not np.array_equal(*views)
