"""Images in memory: what is taken, and everything wrong with what is not, at once."""

import pickle

import numpy as np
import pytest

from jaxft.data import arrays
from jaxft.errors import DataError

IMAGES = np.arange(4 * 5 * 6 * 3, dtype=np.uint8).reshape(4, 5, 6, 3)
TARGETS = np.array([0, 1, 1, 0])


@pytest.mark.parametrize("images", [IMAGES, IMAGES[..., :1]], ids=["colour", "gray"])
def test_images_are_rgb_and_not_copied(images):
    source = arrays(images, TARGETS.astype(np.uint8), ["ant", "bee"])
    assert (len(source), source.classes, source.targets.dtype) == (4, ("ant", "bee"), np.int32)
    assert np.shares_memory(source.images, images)
    image, target = source[2]
    assert (image.mode, image.size, target) == ("RGB", (6, 5), 1)
    np.testing.assert_array_equal(np.asarray(image), np.broadcast_to(images[2], (5, 6, 3)))
    assert pickle.loads(pickle.dumps(source))[2] == (image, target)


NAN = np.where(IMAGES == 7, np.nan, IMAGES / 255)

MISTAKES = {
    "floats": (IMAGES / 255, TARGETS, "ab", ["float64, but must be uint8", "np.rint(255 *"]),
    "NaN": (NAN, TARGETS, "ab", [f"{np.isnan(NAN).sum()} values of images are NaN"]),
    "channels missing": (IMAGES[..., 0], TARGETS, "ab", ["[4, 5, 6]", "images[..., None]"]),
    "channels first": (IMAGES.transpose(0, 3, 1, 2), TARGETS, "ab", ["transpose(0, 2, 3, 1)"]),
    "alpha": (np.repeat(IMAGES[..., :1], 4, 3), TARGETS, "ab", ["[4, 5, 6, 4], but must be"]),
    "no images": (IMAGES[:0], TARGETS[:0], "ab", ["[0, 5, 6, 3]: there are none"]),
    "lengths": (IMAGES, TARGETS[:3], "ab", ["4 images but 3 targets"]),
    "one-hot": (IMAGES, np.eye(4), "ab", ["targets are [4, 4]", "targets.argmax(1)"]),
    "float targets": (IMAGES, TARGETS * 1.0, "ab", ["targets are float64", "must be integers"]),
    "out of range": (IMAGES, TARGETS - 1, "ab", ["2 targets are outside of 0..1", "[0] = -1"]),
    "no classes": (IMAGES, TARGETS, [], ["classes names none"]),
    "a class twice": (IMAGES, TARGETS, ["a", "b", "a"], ["some twice: a"]),
    "everything": (
        IMAGES[..., 0] / 255,
        TARGETS[:3] + 5,
        ["a", "a"],
        ["uint8", "[4, 5, 6]", "outside of 0..1", "twice", "4 images but 3 targets"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(mistake):
    images, targets, classes, fragments = MISTAKES[mistake]
    with pytest.raises(DataError) as caught:
        arrays(images, targets, classes)
    for fragment in fragments:
        assert fragment in str(caught.value)
