"""Views of images: pixel for pixel as torchvision makes them, recorded and live."""

import math
from typing import get_args

import jax
import numpy as np
import pytest
from PIL import Image
from reference import GOLDEN, digest, recorded, sample, torchvision_transforms
from scipy import stats

from jaxft.data import Augment, Preprocessing, geometry
from jaxft.data.augment import VIEWS, View
from jaxft.data.preprocessing import eval_view, train_view
from jaxft.errors import DataError

# transform, height and width of the image, then as the transform takes them: what was drawn (a
# box, an offset), sizes, interpolation.
CASES = {
    "resize, tall, down": ("resize", 300, 217, 64),
    "resize, wide, down": ("resize", 217, 300, 63),
    "resize, long side truncated": ("resize", 37, 53, 30),
    "resize, up": ("resize", 37, 53, 64),
    "resize, same": ("resize", 37, 53, 37),
    "resize, square": ("resize", 41, 41, 24),
    "center_crop, odd from even": ("center_crop", 300, 218, 63),
    "center_crop, even from odd": ("center_crop", 37, 53, 24),
    "center_crop, half to even": ("center_crop", 37, 53, 34),
    "center_crop, short image": ("center_crop", 37, 53, 48),
    "center_crop, narrow image": ("center_crop", 53, 36, 41),
    "center_crop, small image": ("center_crop", 37, 53, 64),
    "center_crop, same": ("center_crop", 41, 41, 41),
    "squash, wide": ("squash", 217, 300, (64, 64)),
    "squash, one side up": ("squash", 37, 53, (48, 31)),
    "resized_crop, down": ("resized_crop", 300, 217, (11, 23, 180, 150), 48),
    "resized_crop, up": ("resized_crop", 37, 53, (5, 7, 21, 19), 48),
    "resized_crop, whole": ("resized_crop", 37, 53, (0, 0, 37, 53), 24),
    "mirror": ("mirror", 37, 53),
    "upend": ("upend", 37, 53),
    "shift, down and left": ("shift", 37, 53, (3, -4)),
    "shift, up": ("shift", 37, 53, (-2, 0)),
    "resize, bicubic": ("resize", 300, 217, 64, "bicubic"),
    "squash, bicubic": ("squash", 217, 300, (64, 48), "bicubic"),
    "resized_crop, bicubic": ("resized_crop", 37, 53, (5, 7, 21, 19), 48, "bicubic"),
}


# What torchvision calls ours, where the names differ.
FUNCTIONAL = {"squash": "resize", "mirror": "hflip", "upend": "vflip"}


def ours(transform, *case) -> np.ndarray:
    height, width, *arguments = case
    return np.asarray(getattr(geometry, transform)(sample(height, width), *arguments))


def torchvisions(transform, *case) -> np.ndarray:
    tv = torchvision_transforms()
    height, width, *arguments = case
    image = sample(height, width)
    mode = [tv.InterpolationMode(name) for name in arguments if isinstance(name, str)]
    if transform == "resized_crop":
        box, size = arguments[:2]
        return np.asarray(tv.functional.resized_crop(image, *box, [size] * 2, *mode))
    if transform == "shift":
        padding = max(map(abs, arguments[0]))
        top, left = (offset + padding for offset in arguments[0])
        padded = tv.functional.pad(image, padding)
        return np.asarray(tv.functional.crop(padded, top, left, height, width))
    size = [np.ravel(a).tolist() for a in arguments[:1]]
    name = FUNCTIONAL.get(transform, transform)
    return np.asarray(getattr(tv.functional, name)(image, *size, *mode))


LEVELS = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)  # every value, as [h w c]


@pytest.mark.parametrize("case", CASES)
def test_transform_equals_torchvision_recorded(case):
    assert digest(ours(*CASES[case])) == recorded("transforms.npz")[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_transform_equals_torchvision_live(case):
    np.testing.assert_array_equal(ours(*CASES[case]), torchvisions(*CASES[case]))


def test_normalize_equals_torchvision_recorded():
    with np.load(GOLDEN / "transforms.npz") as golden:
        expected = golden["normalized"]
    normalize = Preprocessing().normalize
    for function in (normalize, jax.jit(normalize)):
        result = function(LEVELS[None])
        assert result.dtype == np.float32
        np.testing.assert_allclose(result[0], expected, rtol=0, atol=1e-6)


def test_normalize_takes_its_own_mean_and_std():
    preprocessing = Preprocessing(mean=(0.5, 0, 0), std=(0.5, 1, 0.25))
    white = np.full((2, 3, 4, 3), 255, np.uint8)
    np.testing.assert_allclose(
        preprocessing.normalize(white), np.broadcast_to([1.0, 1.0, 4.0], white.shape)
    )


# The random ones.


@pytest.mark.parametrize("shape", [(37, 53), (300, 217), (8, 8), (1, 1)])
def test_crop_box_lies_inside(shape):
    rng = np.random.default_rng(0)
    for _ in range(300):
        top, left, h, w = geometry.crop_box(*shape, rng)
        assert 0 <= top <= shape[0] - h < shape[0]
        assert 0 <= left <= shape[1] - w < shape[1]


def boxes_by_the_formula(height, width, count, rng) -> np.ndarray:
    """[count 4], written down again for many at a time: all ten tries, then the first that fits."""
    area = height * width * rng.uniform(0.08, 1, (count, 10))
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), (count, 10)))
    w, h = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (w <= width) & (h <= height)
    assert fits.any(axis=1).all()  # so often that the fallback needs a test of its own
    first = np.arange(count), fits.argmax(axis=1)
    w, h = w[first], h[first]
    top = np.floor(rng.uniform(size=count) * (height - h + 1))
    left = np.floor(rng.uniform(size=count) * (width - w + 1))
    return np.stack([top, left, h, w], axis=1)


def assert_same_distribution(some, others):
    for name, a, b in zip(("top", "left", "height", "width"), some.T, others.T, strict=True):
        assert stats.ks_2samp(a, b).pvalue > 0.01, name


@pytest.mark.parametrize("shape", [(512, 512), (375, 500)])
def test_crop_boxes_are_distributed_by_the_formula(shape):
    rng = np.random.default_rng(0)
    ours = np.array([geometry.crop_box(*shape, rng) for _ in range(10_000)])
    expected = boxes_by_the_formula(*shape, 10_000, np.random.default_rng(1))
    assert_same_distribution(ours, expected)
    # The test has teeth: boxes from 10 % of the area on, not 8, are told apart.
    with pytest.raises(AssertionError):
        assert_same_distribution(ours[ours[:, 2] * ours[:, 3] > 0.1 * np.prod(shape)], expected)


def test_crop_boxes_are_distributed_as_torchvisions_live():
    tv = torchvision_transforms()
    import torch

    torch.manual_seed(0)
    image, rng = sample(375, 500), np.random.default_rng(0)
    draw = tv.RandomResizedCrop.get_params
    theirs = [draw(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(10_000)]
    ours = [geometry.crop_box(375, 500, rng) for _ in range(10_000)]
    assert_same_distribution(np.array(ours), np.array(theirs))


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((1000, 10), (493, 0, 13, 10)),
        ((9, 1000), (0, 494, 9, 12)),
        ((10, 1001), (0, 494, 10, 13)),
    ],
)
def test_crop_box_of_extreme_images_is_central(shape, box):
    rng = np.random.default_rng(0)
    assert geometry.crop_box(*shape, rng) == box


def test_shifts_are_all_equally_likely():
    rng = np.random.default_rng(0)
    drawn = [geometry.shift_offset(2, rng) for _ in range(10_000)]
    offsets, counts = np.unique(drawn, axis=0, return_counts=True)
    assert offsets.tolist() == [[y, x] for y in range(-2, 3) for x in range(-2, 3)]
    assert stats.chisquare(counts).pvalue > 0.01


# Views.

SMALL = Preprocessing(image_size=24, resize_size=28)
EXACT = Preprocessing(image_size=24, resize_size=None)


def view(image, preprocessing, augment, seed=0):
    return train_view(image, preprocessing, augment, np.random.default_rng(seed))


@pytest.mark.parametrize("augment", VIEWS)
def test_training_views_have_the_size_and_repeat(augment):
    image = sample(37, 53)
    pixels = image.tobytes()
    views = [view(image, SMALL, augment, seed) for seed in (0, 0, 1, 2, 3, 4)]
    assert {(v.shape, v.dtype) for v in views} == {((24, 24, 3), np.dtype(np.uint8))}
    np.testing.assert_array_equal(views[0], views[1])
    expected = {"none": 1, "flip": 2}.get(augment, 5)
    assert len({v.tobytes() for v in views}) == expected
    assert image.tobytes() == pixels  # a cache hands out the same image again and again


def test_every_augment_has_a_view():
    assert tuple(VIEWS) == get_args(Augment)


# The views that measured results depend on: for the same seeds they must stay the same.
DIGESTS = {
    "none": "d0446b3f63179a9422f933b642d2e2f1bdc5f36fe8669ea7f128c32bd2632422",
    "crop_flip": "9a44dee89f74fed2bef2a81efb311acd3db550cae4c6e9064f4409625c80af41",
    "shift": "b21a4acd1c84067f8f443ebfe611f9269c1aeadfc87cf585d1cbe971b8d41277",
}


@pytest.mark.parametrize("augment", DIGESTS)
def test_training_views_never_change(augment):
    views = [view(sample(37, 53), SMALL, augment, seed) for seed in range(8)]
    assert digest(*views) == DIGESTS[augment]


@pytest.mark.parametrize("field", ["mirror", "upend"])
def test_mirrored_half_of_the_time(field):
    image, change = sample(24, 24), getattr(geometry, field)
    shown, mirrored = np.asarray(image), np.asarray(change(image))
    made = [view(image, EXACT, View(**{field: 0.5}), seed) for seed in range(400)]
    count = sum(np.array_equal(v, mirrored) for v in made)
    assert count + sum(np.array_equal(v, shown) for v in made) == 400
    assert stats.binomtest(count, 400).pvalue > 0.01


def test_views_without_augmentation_are_the_evaluation_view():
    image = sample(37, 53)
    expected = geometry.center_crop(geometry.resize(image, 28), 24)
    np.testing.assert_array_equal(eval_view(image, SMALL), expected)
    np.testing.assert_array_equal(view(image, SMALL, "none"), expected)


def test_views_of_squashed_images():
    image = sample(37, 53)
    squash = Preprocessing(image_size=24, resize_size=28, resize_mode="squash")
    expected = geometry.center_crop(geometry.squash(image, (28, 28)), 24)
    np.testing.assert_array_equal(eval_view(image, squash), expected)
    np.testing.assert_array_equal(view(image, squash, "none"), expected)


def test_views_without_resizing():
    image = sample(24, 24)
    np.testing.assert_array_equal(eval_view(image, EXACT), image)
    assert view(sample(37, 53), EXACT, "crop_flip").shape == (24, 24, 3)  # brings its own size


@pytest.mark.parametrize("augment", ["none", "shift"])
def test_wrong_size_without_resizing(augment):
    with pytest.raises(DataError, match=r"53x37 but the network expects 24x24.*set resize_size"):
        view(sample(37, 53), EXACT, augment)


def test_unknown_augment():
    with pytest.raises(DataError, match="unknown augment 'mixup': use one of none, crop_flip, shi"):
        view(sample(24, 24), EXACT, "mixup")


# Long images: the whole, scaled, would not fit into memory.


@pytest.mark.parametrize("shape", [(17 * 5, 5), (7, 40 * 7), (3, 200)])
@pytest.mark.parametrize(("side", "size"), [(40, 32), (20, 32), (33, 33)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_long_images_are_scaled_and_cropped_as_others(shape, side, size, interpolation):
    image = sample(*shape)
    whole = geometry.center_crop(geometry.resize(image, side, interpolation), size)
    part = geometry.resized_center(image, side, size, interpolation)
    np.testing.assert_allclose(np.asarray(part, int), np.asarray(whole, int), atol=1)


@pytest.mark.parametrize("shape", [(2, 60_000), (60_000, 1)])
def test_very_long_images_take_little_memory(shape, monkeypatch):
    largest = []
    real = Image.Image.resize

    def resize(self, size, *args):
        largest.append(math.prod(size))
        return real(self, size, *args)

    monkeypatch.setattr(Image.Image, "resize", resize)
    image = Image.new("RGB", shape, (9, 8, 7))
    assert (eval_view(image, Preprocessing()) == (9, 8, 7)).all()
    for augment in ("crop_flip", "shift_flip"):
        train_view(image, Preprocessing(), augment, np.random.default_rng(0))
    assert max(largest) <= 256 * 256
