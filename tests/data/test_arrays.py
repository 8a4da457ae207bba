"""`arrays`: accepted images and targets, error messages, and float images."""

import pickle

import numpy as np
import pytest

from jaxft.data import (
    BatchConfig,
    Preprocessing,
    Splits,
    View,
    arrays,
    eval_batches,
    fingerprint,
    open_source,
    train_batches,
)
from jaxft.errors import DataError

IMAGES = np.arange(4 * 5 * 6 * 3, dtype=np.uint8).reshape(4, 5, 6, 3)
TARGETS = np.array([0, 1, 1, 0])
LABELS = np.array([[0, 1], [1, 1], [0, 0], [1, 0]])


@pytest.mark.parametrize("images", [IMAGES, IMAGES[..., :1]], ids=["colour", "gray"])
def test_arrays_returns_rgb_images_without_copying(images):
    source = arrays(images, TARGETS.astype(np.uint8), ["ant", "bee"])
    assert (len(source), source.classes, source.targets.dtype) == (4, ("ant", "bee"), np.int32)
    assert np.shares_memory(source.images, images)
    image, target = source[2]
    assert (image.mode, image.size, target) == ("RGB", (6, 5), 1)
    np.testing.assert_array_equal(np.asarray(image), np.broadcast_to(images[2], (5, 6, 3)))
    assert pickle.loads(pickle.dumps(source))[2] == (image, target)


NAN = np.where(IMAGES == 7, np.nan, IMAGES / 255)

ERRORS = {
    "floats": (IMAGES / 255, TARGETS, "ab", ["float64, but must be uint8", "np.rint(255 *"]),
    "NaN": (NAN, TARGETS, "ab", [f"{np.isnan(NAN).sum()} values of images are NaN"]),
    "channels missing": (IMAGES[..., 0], TARGETS, "ab", ["[4, 5, 6]", "images[..., None]"]),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), TARGETS, "ab", ["transpose(0, 2, 3, 1)"]),
    "alpha": (
        np.repeat(IMAGES[..., :1], 4, 3),
        TARGETS,
        "ab",
        ["[4, 5, 6, 4], but need [n h w 3]"],
    ),
    "no images": (IMAGES[:0], TARGETS[:0], "ab", ["[0, 5, 6, 3]: there are none"]),
    "lengths": (IMAGES, TARGETS[:3], "ab", ["4 images but 3 targets"]),
    "one-hot": (IMAGES, np.eye(4), "ab", ["targets have shape [4, 4]", "targets.argmax(1)"]),
    "one-hot, classes": (IMAGES, np.eye(2)[TARGETS] > 0, "abc", ["rows use targets.argmax(1)"]),
    "labels, classes": (IMAGES, LABELS, "abc", ["[4, 2], but need [n], or", "labels [n 3]"]),
    "labels, floats": (IMAGES, LABELS * 1.0, "ab", ["for rows of labels use targets.astype(int)"]),
    "labels, unknown": (
        IMAGES,
        LABELS - LABELS[::-1],
        "ab",
        ["4 targets are neither 0 nor 1: targets[0, 0] = -1, targets[2, 0] = -1"],
    ),
    "labels, lengths": (IMAGES, LABELS[:3], "ab", ["4 images but 3 targets"]),
    "probabilities": (IMAGES, np.full((4, 2), 0.5), "ab", ["probabilities are not supported"]),
    "a row": (IMAGES, TARGETS[None], "ab", ["they are one row: targets[0]"]),
    "three axes": (IMAGES, TARGETS[:, None, None], "ab", ["[4, 1, 1], but need [n]"]),
    "ragged": (
        IMAGES,
        [[0], [1, 2], [0], [1]],
        "ab",
        ["targets must form one array of equal shapes"],
    ),
    "whole floats": (IMAGES, TARGETS * 1.0, "ab", ["whole numbers: targets.astype(int)"]),
    "a column of floats": (IMAGES, TARGETS[:, None] * 1.0, "ab", ["targets.astype(int)"]),
    "fractions": (IMAGES, TARGETS + 0.5, "ab", ["targets are float64", "0.5 is no index"]),
    "NaN targets": (IMAGES, [0, 1, np.nan, 1], "ab", ["1 are NaN or infinite: leave out images"]),
    "bool targets": (IMAGES, TARGETS > 0, "ab", ["convert booleans with targets.astype(int)"]),
    "names": (IMAGES, np.array(["a", "b", "b", "a"]), "ab", ["classes.index(name) for name"]),
    "from 1": (IMAGES, TARGETS + 1, "ab", ["2 targets are outside", "count from 1: targets - 1"]),
    "integers": (IMAGES.astype(int), TARGETS, "ab", ["int64, but", "fit: images.astype(np.uint8)"]),
    "16 bits": (IMAGES.astype(np.uint16) + 255, TARGETS, "ab", ["they are 255 to"]),
    "float levels": (IMAGES * 1.0, TARGETS, "ab", ["0..255 use np.rint(images).astype(np.uint8)"]),
    "standardized": (
        IMAGES / 255 - 0.5,
        TARGETS,
        "ab",
        ["for the network use values='normalized'"],
    ),
    "sizes": ([IMAGES[0], IMAGES[0, :4]], [0, 1], "ab", ["images must form one array of equal"]),
    "nothing": (None, None, "ab", ["images are object", "targets have shape [], but need [n]"]),
    "classes are None": (IMAGES, TARGETS, None, ["classes are None, but must be the names"]),
    "words": (IMAGES.astype(str), TARGETS, "ab", ["but must be uint8 (0..255)"]),
    "float targets": (IMAGES, TARGETS * 1.0, "ab", ["targets are float64", "must be integers"]),
    "out of range": (IMAGES, TARGETS - 1, "ab", ["2 targets are outside of 0..1", "[0] = -1"]),
    "no classes": (IMAGES, TARGETS, [], ["classes is empty"]),
    "a class twice": (IMAGES, TARGETS, ["a", "b", "a"], ["classes repeats names: a"]),
    "everything": (
        IMAGES[..., 0] / 255,
        TARGETS[:3] + 5,
        ["a", "a"],
        ["uint8", "[4, 5, 6]", "outside of 0..1", "repeats", "4 images but 3 targets"],
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_arrays_error(case):
    images, targets, classes, fragments = ERRORS[case]
    with pytest.raises(DataError) as caught:
        arrays(images, targets, classes)
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_arrays_accepts_column_of_targets():  # as in keras.datasets
    targets = np.array([[3], [1], [2], [0]], np.uint8)
    source = arrays(IMAGES, targets, "abcd")
    assert source.targets.tolist() == [3, 1, 2, 0]
    assert arrays(IMAGES, targets * 0, "a").targets.tolist() == [0, 0, 0, 0]


# Float images.


@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_unit_floats_become_uint8(channels):
    levels = IMAGES[..., :channels]
    for dtype in (np.float32, np.float64):
        source = arrays((levels / 255).astype(dtype), TARGETS, "ab", values="unit")
        np.testing.assert_array_equal(source.images, levels)
        assert fingerprint(source) == fingerprint(arrays(levels, TARGETS, "ab"))


PREPROCESSING = Preprocessing(image_size=8, resize_size=10)


def normalized(images, preprocessing=PREPROCESSING):
    return np.asarray(preprocessing.normalize(images))


def batches(source, augment):
    """Returns evaluation batches if `augment` is None, else training batches."""
    if augment is None:
        return list(eval_batches(source, PREPROCESSING, batch_size=3, workers=0))
    return list(
        train_batches(
            source,
            BatchConfig(
                preprocessing=PREPROCESSING, augment=augment, batch_size=3, seed=0, stage=0
            ),
            epochs=2,
        )
    )  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("augment", [None, "none", "flip", "crop_flip", View(vflip=0.5)])
def test_arrays_normalized_floats_are_augmented_like_uint8(channels, augment):
    levels = IMAGES[..., :channels]
    color = np.repeat(levels, 3 // channels, -1)
    float_source = arrays(normalized(color), TARGETS, "ab", values="normalized")
    uint8_source = arrays(levels, TARGETS, "ab")
    for float_batch, uint8_batch in zip(
        batches(float_source, augment), batches(uint8_source, augment), strict=True
    ):
        assert float_batch.image.dtype == np.float32
        actual = float_batch.image[float_batch.mask]
        expected = normalized(uint8_batch.image)[uint8_batch.mask]
        rounding = 1.5 / 255 / min(PREPROCESSING.std)  # uint8 is rounded in both passes of a resize
        np.testing.assert_allclose(actual, expected, atol=rounding, rtol=0)
        np.testing.assert_array_equal(float_batch.target, uint8_batch.target)


def test_arrays_shift_of_normalized_floats_pads_zeros():
    source = arrays(np.ones((2, 8, 8, 1), np.float16), [0, 1], "ab", values="normalized")
    shifted = [batch.image[batch.mask] for batch in batches(source, "shift")]
    assert {*np.unique(shifted)} == {0, 1}


@pytest.mark.parametrize("augment", ["jitter", "randaugment", "trivialaugment"])
def test_arrays_normalized_floats_refuse_colour_augmentation(augment):
    source = arrays(normalized(IMAGES), TARGETS, "ab", values="normalized")
    with pytest.raises(DataError, match=f"augment={augment} changes colours.*one of none, crop_fl"):
        batches(source, augment)


def test_arrays_normalized_floats_join_but_do_not_mix_with_uint8():
    source = arrays(normalized(IMAGES), TARGETS, "ab", values="normalized")
    splits = open_source(Splits(source, source), train="train+val", val="val")
    assert {batch.image.dtype.name for batch in batches(splits.train, "flip")} == {"float32"}
    with pytest.raises(DataError, match="of train are float32, but images of val are uint8"):
        open_source(Splits(source, arrays(IMAGES, TARGETS, "ab")))


@pytest.mark.parametrize(
    ("images", "values", "message"),
    [
        (IMAGES, "unit", "images are uint8, but values='unit' is for floats"),
        (IMAGES, "normalized", "images are uint8, but values='normalized' is for floats"),
        (IMAGES / 128, "unit", r"range from 0 to 1\.99\d, but values='unit' is for 0\.\.1"),
        (IMAGES / 255 - 0.5, "unit", "values='normalized'"),
        (IMAGES * 1.0, "normalized", "whole numbers from 0 to 255, but values='normalized'"),
        (NAN, "unit", "values of images are NaN"),
        (IMAGES / np.float32(0.1) - np.inf, "normalized", "360 values of images are NaN or inf"),
        (IMAGES / 255, "float", "values 'float' is unknown: use uint8, unit, normalized"),
    ],
)
def test_arrays_values_error(images, values, message):
    with pytest.raises(DataError, match=message):
        arrays(images, TARGETS, "ab", values=values)
