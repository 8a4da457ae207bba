"""Views of images: pixel for pixel as torchvision makes them, recorded and live."""

import hashlib
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from PIL import Image

from jaxft.data import Preprocessing, transforms
from jaxft.data.preprocessing import eval_view, train_view
from jaxft.errors import DataError

GOLDEN = Path(__file__).parents[1] / "golden" / "transforms.npz"  # by record_transforms.py


def sample(height: int, width: int) -> Image.Image:
    """A gradient with noise, in integer arithmetic so that it is the same everywhere."""
    y, x, c = np.ogrid[:height, :width, :3]
    noise = ((y * 7919) ^ (x * 104729) ^ (c * 1299709)) % 64
    return Image.fromarray((128 * y // height + 63 * x // width + noise).astype(np.uint8))


# transform, height and width of the image, its argument (the box that is drawn, interpolation).
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
    "random_resized_crop, down": ("random_resized_crop", 300, 217, 48, (11, 23, 180, 150)),
    "random_resized_crop, up": ("random_resized_crop", 37, 53, 48, (5, 7, 21, 19)),
    "random_resized_crop, whole": ("random_resized_crop", 37, 53, 24, (0, 0, 37, 53)),
    "resize, bicubic": ("resize", 300, 217, 64, None, "bicubic"),
    "random_resized_crop, bicubic": (
        ("random_resized_crop", 37, 53, 48, (5, 7, 21, 19), "bicubic")
    ),
}


def ours(transform, height, width, argument, box=None, *interpolation) -> np.ndarray:
    image = sample(height, width)
    if box is None:
        return np.asarray(getattr(transforms, transform)(image, argument, *interpolation))
    with mock.patch.object(transforms, "crop_box", return_value=box):
        rng = np.random.default_rng()
        return np.asarray(transforms.random_resized_crop(image, argument, rng, *interpolation))


def torchvisions(transform, height, width, argument, box=None, *interpolation) -> np.ndarray:
    transforms = torchvision_transforms()
    mode = [transforms.InterpolationMode(name) for name in interpolation]
    image = sample(height, width)
    if box is None:
        return np.asarray(getattr(transforms.functional, transform)(image, [argument], *mode))
    return np.asarray(transforms.functional.resized_crop(image, *box, [argument] * 2, *mode))


def torchvision_transforms():
    torch = pytest.importorskip("torch")
    try:
        return pytest.importorskip("torchvision.transforms")
    except RuntimeError:
        # Beside a CPU build of torch, the operators of torchvision's extension are missing, and
        # it refuses to load until somebody declares them. No transform uses them.
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor a, Tensor b, float c) -> Tensor")
        from torchvision import transforms as module

        module.library = library  # what it declared ends with it
        return module


def digest(pixels: np.ndarray) -> str:
    return hashlib.sha256(repr(pixels.shape).encode() + pixels.tobytes()).hexdigest()


LEVELS = np.arange(256, dtype=np.uint8)[:, None, None].repeat(3, axis=2)  # every value, as [h w c]


@pytest.mark.parametrize("case", CASES)
def test_transform_equals_torchvision_recorded(case):
    with np.load(GOLDEN) as golden:
        digests = dict(zip(golden["names"], golden["digests"], strict=True))
    assert digest(ours(*CASES[case])) == digests[case]


@pytest.mark.parametrize("case", CASES)
def test_transform_equals_torchvision_live(case):
    np.testing.assert_array_equal(ours(*CASES[case]), torchvisions(*CASES[case]))


def test_normalize_equals_torchvision_recorded():
    with np.load(GOLDEN) as golden:
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
        top, left, h, w = transforms.crop_box(*shape, rng)
        assert 0 <= top <= shape[0] - h < shape[0]
        assert 0 <= left <= shape[1] - w < shape[1]


def test_crop_box_distribution():
    rng = np.random.default_rng(0)
    side = 1000
    boxes = np.array([transforms.crop_box(side, side, rng) for _ in range(4000)])
    top, left, h, w = boxes.T.astype(float)
    area, log_ratio = h * w / side**2, np.log(w / h)
    assert area.min() == pytest.approx(0.08, abs=0.01)
    assert area.max() <= 1
    assert np.abs(log_ratio).max() == pytest.approx(np.log(4 / 3), abs=0.01)
    assert log_ratio.mean() == pytest.approx(0, abs=0.02)
    # Boxes that can be placed are at any place: the corner is uniform in the room that is left.
    room = (h < side) & (w < side)
    for offset, length in ((top, h), (left, w)):
        share = offset[room] / (side - length[room])
        assert (share.min(), share.max()) == (0, 1)
        assert share.mean() == pytest.approx(0.5, abs=0.03)
    # Small ones always fit: their areas and log-ratios are uniform.
    fits = area < 0.5
    assert np.median(area[fits]) == pytest.approx(0.29, abs=0.02)
    assert np.median(np.abs(log_ratio[fits])) == pytest.approx(np.log(4 / 3) / 2, abs=0.02)


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
    assert transforms.crop_box(*shape, rng) == box


def test_horizontal_flip_mirrors_half_of_the_time():
    image, rng = sample(5, 7), np.random.default_rng(0)
    mirrored = 0
    for _ in range(400):
        view = np.asarray(transforms.horizontal_flip(image, rng))
        if not np.array_equal(view, np.asarray(image)):
            np.testing.assert_array_equal(view, np.asarray(image)[:, ::-1])
            mirrored += 1
    assert 160 < mirrored < 240


def test_shift_is_every_crop_of_the_padded_image():
    image, rng = sample(5, 7), np.random.default_rng(0)
    padded = np.pad(np.asarray(image), ((2, 2), (2, 2), (0, 0)))
    crops = {padded[y : y + 5, x : x + 7].tobytes() for y in range(5) for x in range(5)}
    shifted = {transforms.shift(image, 2, rng).tobytes() for _ in range(400)}
    assert shifted == crops


# Views.

SMALL = Preprocessing(image_size=24, resize_size=28)
EXACT = Preprocessing(image_size=24, resize_size=None)


def view(image, preprocessing, augment, seed=0):
    return train_view(image, preprocessing, augment, np.random.default_rng(seed))


@pytest.mark.parametrize("augment", ["none", "crop_flip", "shift"])
def test_training_views_have_the_size_and_repeat(augment):
    image = sample(37, 53)
    views = [view(image, SMALL, augment, seed) for seed in (0, 0, 1, 2)]
    assert {(v.shape, v.dtype) for v in views} == {((24, 24, 3), np.dtype(np.uint8))}
    np.testing.assert_array_equal(views[0], views[1])
    assert len({v.tobytes() for v in views}) == (1 if augment == "none" else 3)


def test_views_without_augmentation_are_the_evaluation_view():
    image = sample(37, 53)
    expected = transforms.center_crop(transforms.resize(image, 28), 24)
    np.testing.assert_array_equal(eval_view(image, SMALL), expected)
    np.testing.assert_array_equal(view(image, SMALL, "none"), expected)


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
