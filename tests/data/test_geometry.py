"""Geometry and views: pixels equal torchvision's, recorded and live."""

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

# Transform, height and width of the image, and the transform's other arguments.
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
    "mirror": ("hflip", 37, 53),
    "upend": ("vflip", 37, 53),
    "shift, down and left": ("shift", 37, 53, (3, -4)),
    "shift, up": ("shift", 37, 53, (-2, 0)),
    "resize, bicubic": ("resize", 300, 217, 64, "bicubic"),
    "squash, bicubic": ("squash", 217, 300, (64, 48), "bicubic"),
    "resized_crop, bicubic": ("resized_crop", 37, 53, (5, 7, 21, 19), 48, "bicubic"),
}


def our_pixels(transform, *case) -> np.ndarray:
    height, width, *arguments = case
    return np.asarray(getattr(geometry, transform)(sample(height, width), *arguments))


def torchvision_pixels(transform, *case) -> np.ndarray:
    tv = torchvision_transforms()
    height, width, *arguments = case
    image = sample(height, width)
    interpolation = [tv.InterpolationMode(name) for name in arguments if isinstance(name, str)]
    if transform == "resized_crop":
        box, size = arguments[:2]
        return np.asarray(tv.functional.resized_crop(image, *box, [size] * 2, *interpolation))
    if transform == "shift":
        padding = max(map(abs, arguments[0]))
        top, left = (offset + padding for offset in arguments[0])
        padded = tv.functional.pad(image, padding)
        return np.asarray(tv.functional.crop(padded, top, left, height, width))
    size = [np.ravel(a).tolist() for a in arguments[:1]]
    name = "resize" if transform == "squash" else transform
    return np.asarray(getattr(tv.functional, name)(image, *size, *interpolation))


LEVELS = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)  # [h w c]


@pytest.mark.parametrize("case", CASES)
def test_geometry_equals_torchvision_recorded(case):
    assert digest(our_pixels(*CASES[case])) == recorded("transforms.npz")[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_geometry_equals_torchvision_live(case):
    np.testing.assert_array_equal(our_pixels(*CASES[case]), torchvision_pixels(*CASES[case]))


def test_normalize_equals_torchvision_recorded():
    with np.load(GOLDEN / "transforms.npz") as golden:
        expected = golden["normalized"]
    normalize = Preprocessing().normalize
    for function in (normalize, jax.jit(normalize)):
        normalized = function(LEVELS[None])
        assert normalized.dtype == np.float32
        np.testing.assert_allclose(normalized[0], expected, rtol=0, atol=1e-6)


def test_normalize_uses_mean_and_std():
    preprocessing = Preprocessing(mean=(0.5, 0, 0), std=(0.5, 1, 0.25))
    white = np.full((2, 3, 4, 3), 255, np.uint8)
    np.testing.assert_allclose(
        preprocessing.normalize(white), np.broadcast_to([1.0, 1.0, 4.0], white.shape)
    )


# Random parameters.


@pytest.mark.parametrize("shape", [(37, 53), (300, 217), (8, 8), (1, 1)])
def test_random_crop_box_lies_inside(shape):
    rng = np.random.default_rng(0)
    for _ in range(300):
        top, left, h, w = geometry.random_crop_box(*shape, rng)
        assert 0 <= top <= shape[0] - h < shape[0]
        assert 0 <= left <= shape[1] - w < shape[1]


def reference_boxes(height, width, count, rng) -> np.ndarray:
    """Returns boxes [count 4] by an independent, vectorised implementation."""
    area = height * width * rng.uniform(0.08, 1, (count, 10))
    ratio = np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3), (count, 10)))
    w, h = np.round(np.sqrt(area * ratio)), np.round(np.sqrt(area / ratio))
    fits = (w <= width) & (h <= height)
    assert fits.any(axis=1).all()  # a separate test covers the fallback
    first = np.arange(count), fits.argmax(axis=1)
    w, h = w[first], h[first]
    top = np.floor(rng.uniform(size=count) * (height - h + 1))
    left = np.floor(rng.uniform(size=count) * (width - w + 1))
    return np.stack([top, left, h, w], axis=1)


def assert_same_distribution(boxes, other_boxes):
    names = ("top", "left", "height", "width")
    for name, a, b in zip(names, boxes.T, other_boxes.T, strict=True):
        assert stats.ks_2samp(a, b).pvalue > 0.01, name


@pytest.mark.parametrize("shape", [(512, 512), (375, 500)])
def test_random_crop_boxes_are_distributed_as_reference(shape):
    rng = np.random.default_rng(0)
    boxes = np.array([geometry.random_crop_box(*shape, rng) for _ in range(10_000)])
    expected = reference_boxes(*shape, 10_000, np.random.default_rng(1))
    assert_same_distribution(boxes, expected)
    # The test detects a minimum area of 10 % instead of 8 %.
    large = boxes[:, 2] * boxes[:, 3] > 0.1 * np.prod(shape)
    with pytest.raises(AssertionError):
        assert_same_distribution(boxes[large], expected)


def test_random_crop_boxes_are_distributed_as_torchvision_live():
    tv = torchvision_transforms()
    import torch

    torch.manual_seed(0)
    image, rng = sample(375, 500), np.random.default_rng(0)
    get_params = tv.RandomResizedCrop.get_params
    expected = [get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(10_000)]
    boxes = [geometry.random_crop_box(375, 500, rng) for _ in range(10_000)]
    assert_same_distribution(np.array(boxes), np.array(expected))


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ((1000, 10), (493, 0, 13, 10)),
        ((9, 1000), (0, 494, 9, 12)),
        ((10, 1001), (0, 494, 10, 13)),
    ],
)
def test_random_crop_box_of_long_images_is_central(shape, box):
    rng = np.random.default_rng(0)
    assert geometry.random_crop_box(*shape, rng) == box


def test_random_offsets_are_uniform():
    rng = np.random.default_rng(0)
    draws = [geometry.random_offset(2, rng) for _ in range(10_000)]
    offsets, counts = np.unique(draws, axis=0, return_counts=True)
    assert offsets.tolist() == [[y, x] for y in range(-2, 3) for x in range(-2, 3)]
    assert stats.chisquare(counts).pvalue > 0.01


# Views.

SMALL = Preprocessing(image_size=24, resize_size=28)
EXACT = Preprocessing(image_size=24, resize_size=None)


def seeded_view(image, preprocessing, augment, seed=0):
    return train_view(image, preprocessing, augment, np.random.default_rng(seed))


@pytest.mark.parametrize("augment", VIEWS)
def test_train_view_has_input_size_and_depends_on_seed_alone(augment):
    image = sample(37, 53)
    pixels = image.tobytes()
    views = [seeded_view(image, SMALL, augment, seed) for seed in (0, 0, 1, 2, 3, 4)]
    assert {(v.shape, v.dtype) for v in views} == {((24, 24, 3), np.dtype(np.uint8))}
    np.testing.assert_array_equal(views[0], views[1])
    expected = {"none": 1, "flip": 2}.get(augment, 5)
    assert len({v.tobytes() for v in views}) == expected
    assert image.tobytes() == pixels  # unchanged, as a cache returns the same image again


def test_every_augment_name_has_a_view():
    assert tuple(VIEWS) == get_args(Augment)


# Measured results depend on these views.
VIEW_DIGESTS = {
    "none": "d0446b3f63179a9422f933b642d2e2f1bdc5f36fe8669ea7f128c32bd2632422",
    "crop_flip": "9a44dee89f74fed2bef2a81efb311acd3db550cae4c6e9064f4409625c80af41",
    "shift": "b21a4acd1c84067f8f443ebfe611f9269c1aeadfc87cf585d1cbe971b8d41277",
}


@pytest.mark.parametrize("augment", VIEW_DIGESTS)
def test_train_views_never_change(augment):
    views = [seeded_view(sample(37, 53), SMALL, augment, seed) for seed in range(8)]
    assert digest(*views) == VIEW_DIGESTS[augment]


@pytest.mark.parametrize("field", ["hflip", "vflip"])
def test_train_view_flip_probability(field):
    image, flip = sample(24, 24), getattr(geometry, field)
    original, flipped = np.asarray(image), np.asarray(flip(image))
    views = [seeded_view(image, EXACT, View(**{field: 0.5}), seed) for seed in range(400)]
    count = sum(np.array_equal(v, flipped) for v in views)
    assert count + sum(np.array_equal(v, original) for v in views) == 400
    assert stats.binomtest(count, 400).pvalue > 0.01


def test_train_view_without_augmentation_is_eval_view():
    image = sample(37, 53)
    expected = geometry.center_crop(geometry.resize(image, 28), 24)
    np.testing.assert_array_equal(eval_view(image, SMALL), expected)
    np.testing.assert_array_equal(seeded_view(image, SMALL, "none"), expected)


def test_view_with_resize_mode_squash():
    image = sample(37, 53)
    squash = Preprocessing(image_size=24, resize_size=28, resize_mode="squash")
    expected = geometry.center_crop(geometry.squash(image, (28, 28)), 24)
    np.testing.assert_array_equal(eval_view(image, squash), expected)
    np.testing.assert_array_equal(seeded_view(image, squash, "none"), expected)


def test_view_without_resizing():
    image = sample(24, 24)
    np.testing.assert_array_equal(eval_view(image, EXACT), image)
    assert seeded_view(sample(37, 53), EXACT, "crop_flip").shape == (
        24,
        24,
        3,
    )  # resized by the crop


@pytest.mark.parametrize("augment", ["none", "shift"])
def test_view_of_wrong_size_without_resizing_is_an_error(augment):
    with pytest.raises(DataError, match=r"53x37 but the network expects 24x24.*set resize_size"):
        seeded_view(sample(37, 53), EXACT, augment)


def test_unknown_augment_is_an_error():
    with pytest.raises(DataError, match="unknown augment 'mixup': use one of none, crop_flip, shi"):
        seeded_view(sample(24, 24), EXACT, "mixup")


# Long images, which would not fit into memory if they were scaled as a whole.


@pytest.mark.parametrize("shape", [(17 * 5, 5), (7, 40 * 7), (3, 200)])
@pytest.mark.parametrize(("side", "size"), [(40, 32), (20, 32), (33, 33)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_and_center_crop_of_long_images(shape, side, size, interpolation):
    image = sample(*shape)
    whole = geometry.center_crop(geometry.resize(image, side, interpolation), size)
    part = geometry.resize_and_center_crop(image, side, size, interpolation)
    np.testing.assert_allclose(np.asarray(part, int), np.asarray(whole, int), atol=1)


@pytest.mark.parametrize("shape", [(2, 60_000), (60_000, 1)])
def test_view_of_very_long_images_takes_little_memory(shape, monkeypatch):
    pixel_counts = []
    original_resize = Image.Image.resize

    def resize(self, size, *args):
        pixel_counts.append(math.prod(size))
        return original_resize(self, size, *args)

    monkeypatch.setattr(Image.Image, "resize", resize)
    image = Image.new("RGB", shape, (9, 8, 7))
    assert (eval_view(image, Preprocessing()) == (9, 8, 7)).all()
    for augment in ("crop_flip", "shift_flip"):
        train_view(image, Preprocessing(), augment, np.random.default_rng(0))
    assert max(pixel_counts) <= 256 * 256
