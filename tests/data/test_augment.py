"""Colours and policies: pixel for pixel as torchvision's given the same numbers, and as likely."""

from itertools import permutations
from unittest import mock

import numpy as np
import pytest
from reference import digest, recorded, sample, torchvision_transforms
from scipy import stats

from jaxft.data import Preprocessing, autoaugment
from jaxft.data.augment import VIEWS
from jaxft.data.autoaugment import OPERATIONS, RandAugment, TrivialAugmentWide
from jaxft.data.color import Jitter, adjust
from jaxft.data.geometry import crop_box
from jaxft.data.preprocessing import train_view
from jaxft.errors import DataError

# Colours: what was drawn, in order.
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

# Policies: interpolation, then the numbers that are drawn, of which each takes what it needs.
POLICIES = {
    f"{policy.__name__}, {name}, {interpolation}": (policy, k, interpolation)
    for policy in (RandAugment, TrivialAugmentWide)
    for k, name in enumerate(OPERATIONS)
    for interpolation in ("bilinear", "nearest")
    if interpolation == "bilinear" or name in ("ShearY", "TranslateX", "Rotate")
}


def numbers_of(policy, operation):
    """Streams of numbers: operation, magnitude if it is drawn, sign if there is one; and again."""
    if policy is TrivialAugmentWide:
        return [[operation, m, s] for m in (0, 7, 15, 22, 30) for s in (0, 1)]
    chosen = (operation, (operation + 5) % len(OPERATIONS))
    signed = [OPERATIONS[k] in autoaugment._SIGNED for k in chosen]
    return [
        [number for k, has in zip(chosen, signed, strict=True) for number in (k, s)[: 1 + has]]
        for s in (0, 1)
    ]


class Scripted:
    """A generator whose integers were chosen before."""

    def __init__(self, numbers):
        self._numbers = iter(numbers)

    def integers(self, high):
        number = next(self._numbers)
        assert 0 <= number < high
        return number


def our_color(steps):
    images = [sample(*size) for size in SIZES]
    for channel, factor in steps:
        images = [adjust(image, channel, factor) for image in images]
    return images


def torchvisions_color(steps):
    jitter = torchvision_transforms().ColorJitter
    factors = dict(steps)
    order = [CHANNELS.index(channel) for channel, _ in steps]
    drawn = (order, *(factors.get(channel) for channel in CHANNELS))
    with mock.patch.object(jitter, "get_params", return_value=drawn):
        return [jitter(0.5)(sample(*size)) for size in SIZES]


def our_policy(policy, operation, interpolation):
    made = policy(interpolation=interpolation)
    images = []
    for size in SIZES:
        for numbers in numbers_of(policy, operation):
            image = sample(*size)
            for step in made.draw(*size, Scripted(numbers)):
                image = autoaugment.apply(image, step, interpolation)
            images.append(image)
    return images


def torchvisions_policy(policy, operation, interpolation):
    tv = torchvision_transforms()
    import torch

    made = getattr(tv, policy.__name__)(interpolation=tv.InterpolationMode(interpolation))
    images = []
    for size in SIZES:
        for numbers in numbers_of(policy, operation):
            with mock.patch("torch.randint", side_effect=map(torch.tensor, numbers)):
                images.append(made(sample(*size)))
    return images


CASES = {
    **{name: (our_color, torchvisions_color, (steps,)) for name, steps in COLORS.items()},
    **{name: (our_policy, torchvisions_policy, case) for name, case in POLICIES.items()},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_torchvision_recorded(case):
    ours, _, arguments = CASES[case]
    assert digest(*ours(*arguments)) == recorded("transforms_augment.npz")[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_equals_torchvision_live(case):
    ours, torchvisions, arguments = CASES[case]
    for a, b in zip(ours(*arguments), torchvisions(*arguments), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("count", [2, 3, 7, 10, 31, 100])
def test_magnitudes_equal_torchs_live(count):
    torch = pytest.importorskip("torch")
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("torch rounds otherwise on a CPU without AVX2")
    for start, stop in [(0, 0.3), (0, 32), (255, 0), *((0, 150 / 331 * n) for n in range(24, 600))]:
        ours, theirs = autoaugment._linspace(start, stop, count), torch.linspace(start, stop, count)
        np.testing.assert_array_equal(ours, theirs.numpy())


# Equal in distribution.


def test_operations_magnitudes_and_signs_are_equally_likely():
    rng = np.random.default_rng(0)
    trivial, rand = TrivialAugmentWide(), RandAugment()
    steps = [trivial.draw(32, 32, rng)[0] for _ in range(10_000)]
    names, counts = np.unique([name for name, _ in steps], return_counts=True)
    assert set(names) == set(OPERATIONS)
    assert stats.chisquare(counts).pvalue > 0.01
    turned = [magnitude for name, magnitude in steps if name == "Rotate"]
    levels, counts = np.unique(np.abs(turned), return_counts=True)
    np.testing.assert_allclose(levels, np.linspace(0, 135, 31), rtol=1e-6)
    assert stats.chisquare(counts).pvalue > 0.01
    assert stats.binomtest(np.sum(np.array(turned) > 0), np.count_nonzero(turned)).pvalue > 0.01
    pairs = [tuple(name for name, _ in rand.draw(32, 32, rng)) for _ in range(10_000)]
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    assert len(pairs) == len(OPERATIONS) ** 2
    assert stats.chisquare(counts).pvalue > 0.01


def test_jitter_is_uniform_and_in_any_order():
    rng = np.random.default_rng(0)
    jitter = Jitter(brightness=0.4, contrast=1.5, saturation=0.2, hue=0.1)
    drawn = [jitter.draw(rng) for _ in range(10_000)]
    orders = [tuple(channel for channel, _ in steps) for steps in drawn]
    assert set(orders) == set(permutations(CHANNELS))
    assert stats.chisquare(np.unique(orders, axis=0, return_counts=True)[1]).pvalue > 0.01
    ranges = {"brightness": (0.6, 1.4), "contrast": (0, 2.5), "saturation": (0.8, 1.2)}
    for channel, (low, high) in {**ranges, "hue": (-0.1, 0.1)}.items():
        factors = [dict(steps)[channel] for steps in drawn]
        assert stats.kstest(factors, stats.uniform(low, high - low).cdf).pvalue > 0.01


def test_jitter_leaves_alone_what_is_0():
    drawn = Jitter(hue=0.1).draw(np.random.default_rng(0))
    assert [channel for channel, _ in drawn] == ["hue"]
    assert Jitter().draw(np.random.default_rng(0)) == ()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Jitter(hue=0.6), r"Jitter\(.*hue=0.6\): .*hue above 0.5"),
        (lambda: Jitter(contrast=-0.1), "contrast=-0.1.*none may be negative"),
        (lambda: RandAugment(magnitude=31), "magnitude=31.*must lie in 0..30"),
        (lambda: RandAugment(magnitude=-1), "magnitude=-1.*must lie in 0..30"),
    ],
)
def test_what_is_out_of_range(make, message):
    with pytest.raises(DataError, match=message):
        make()


# The whole view, as torchvision composes it.


@pytest.mark.slow
@pytest.mark.parametrize("augment", ["crop_flip", "jitter", "randaugment", "trivialaugment"])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_views_equal_torchvisions_compositions_live(augment, interpolation):
    functional = torchvision_transforms().functional
    mode = torchvision_transforms().InterpolationMode(interpolation)
    preprocessing = Preprocessing(image_size=24, interpolation=interpolation)
    image, flips = sample(37, 53), 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        box = crop_box(37, 53, rng)
        expected = functional.resized_crop(image, *box, [24, 24], mode)
        if rng.random() < 0.5:
            expected, flips = functional.hflip(expected), flips + 1
        if augment == "jitter":
            for channel, factor in VIEWS[augment].jitter.draw(rng):
                expected = getattr(functional, f"adjust_{channel}")(expected, factor)
        elif augment != "crop_flip":
            steps = VIEWS[augment].policy.draw(24, 24, rng)
            apply = torchvision_transforms().autoaugment._apply_op
            bilinear = torchvision_transforms().InterpolationMode("bilinear")
            for step in steps:
                expected = apply(expected, *step, interpolation=bilinear, fill=None)
        view = train_view(image, preprocessing, augment, np.random.default_rng(seed))
        np.testing.assert_array_equal(view, expected)
    assert 0 < flips < 20


def test_views_are_scaled_as_the_weights_expect():
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
