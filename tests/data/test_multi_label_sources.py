"""Sources whose images may have several labels: splits, batches, caches and fingerprints."""

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from jaxft.data import (
    BatchConfig,
    Cached,
    Preprocessing,
    Splits,
    arrays,
    eval_batches,
    fingerprint,
    open_source,
    train_batches,
)
from jaxft.data.fingerprint import changes, record
from jaxft.data.source import images_per_class, is_multi_label
from jaxft.errors import DataError

CLASSES = ("ant", "bee", "cat")
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (50, 4, 4, 3), np.uint8)
LABELS = RNG.integers(0, 2, (50, 3))
SOURCE = arrays(IMAGES, LABELS, CLASSES)
SIZE = Preprocessing(image_size=4, resize_size=4)


@dataclass
class Own:
    """A source of a user, whose red level is its index; the images in `broken` are unreadable."""

    targets: np.ndarray
    classes: tuple[str, ...] = CLASSES
    broken: tuple[int, ...] = ()

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        return Image.new("RGB", (4, 4), (index, 0, 0)), self.targets[index]

    def problem(self, index):
        return f"image {index}: broken" if index in self.broken else None


@pytest.mark.parametrize("dtype", [bool, np.int64, np.uint8])
def test_arrays_takes_labels(dtype):
    source = arrays(IMAGES, LABELS.astype(dtype), CLASSES)
    assert is_multi_label(source)
    assert source.targets.dtype == np.int32
    np.testing.assert_array_equal(source.targets, LABELS)
    np.testing.assert_array_equal(source[7][1], LABELS[7])
    np.testing.assert_array_equal(source.take(np.array([3, 1])).targets, LABELS[[3, 1]])


def test_images_per_class_counts_labels():
    assert images_per_class(SOURCE).tolist() == LABELS.sum(0).tolist()
    assert images_per_class(Own(LABELS > 0)).tolist() == LABELS.sum(0).tolist()
    assert not is_multi_label(None)


def images_of(source):
    return [source.images[k].tobytes() for k in range(len(source))]


def test_default_validation_is_a_fifth_of_all_images():
    train, val, remarks = open_source(SOURCE, seed=3).__dict__.values()
    assert (len(train), len(val)) == (40, 10)
    assert sorted(images_of(train) + images_of(val)) == sorted(images_of(SOURCE))
    assert "20 % of train, drawn with seed 3, validate, 10 images." in remarks[0]
    assert images_of(open_source(SOURCE, seed=3).train) == images_of(train)
    assert images_of(open_source(SOURCE, seed=4).train) != images_of(train)


def test_default_validation_may_take_a_rare_label():
    """A label of one image: some seeds draw it to validate, and the remarks then name it."""
    rare = np.zeros((10, 3), int)
    rare[:, 0], rare[4, 1:] = 1, (1, 0)
    splits = [open_source(arrays(IMAGES[:10], rare, CLASSES), seed=seed) for seed in range(20)]
    without = [each for each in splits if not each.train.targets[:, 1].any()]
    assert 0 < len(without) < 20
    message = "2 of 3 classes have no images to train: bee, cat."
    assert all(message in each.remarks for each in without)


def test_split_by_position_and_its_missing_label():
    splits = open_source(SOURCE, train="train[:80%]")
    np.testing.assert_array_equal(splits.train.targets, LABELS[:40])
    np.testing.assert_array_equal(splits.val.targets, LABELS[40:])
    sorted_labels = LABELS[np.argsort(LABELS[:, 2], kind="stable")]
    with pytest.raises(DataError, match=r"no images of 1 of 3 classes: cat.*shuffle them"):
        open_source(arrays(IMAGES, sorted_labels, CLASSES), train="train[:10]")


def test_split_joins_labels_of_two_sources():
    splits = open_source(Splits(SOURCE, Own(LABELS[:5])), train="train[40:]+val[:2]", val="val")
    np.testing.assert_array_equal(splits.train.targets, np.concatenate([LABELS[40:], LABELS[:2]]))
    np.testing.assert_array_equal(splits.train[11][1], LABELS[1])


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (SOURCE, {"shots": 2}, "shots=2 selects within classes, and images may have several"),
        (SOURCE, {"train": "train[5/class]"}, r"slice by position, such as train\[:80%\]"),
        (Own(LABELS[:, :2]), {}, r"int64 of shape \[50, 2\].*with 3 classes .* \[n 3\], 0 or 1"),
        (Own(LABELS * 0.5), {}, r"float64 of shape \[50, 3\].*labels are integers"),
        (Own(LABELS - 1), {}, "targets of train go from -1 to 0, but labels are 0 or 1"),
        (
            Splits(SOURCE, Own(LABELS[:, 0])),
            {},
            r"train have shape \[50, 3\], but targets of val \[50\]: give both",
        ),
    ],
)
def test_split_error(source, options, message):
    with pytest.raises(DataError, match=message):
        open_source(source, **options)


def test_unreadable_image_may_not_empty_a_label():
    labels = np.array([[1, 1, 0], [1, 0, 1], [1, 0, 1]])
    kept = open_source(Splits(Own(labels, broken=(1,)), Own(labels)), on_bad_image="skip")
    np.testing.assert_array_equal(kept.train.targets, labels[[0, 2]])
    with pytest.raises(DataError, match=r"none are left of bee \(train\)"):
        open_source(Splits(Own(labels, broken=(0,)), Own(labels)), on_bad_image="skip")


@pytest.mark.parametrize("source", [Own(LABELS), Own(LABELS > 0), Cached(Own(LABELS), 2**20)])
@pytest.mark.parametrize("features", [False, True])
def test_batches_hold_labels(source, features):
    rows = np.arange(50, dtype=np.float32)[:, None]
    for _ in range(2):  # the second time from the cache
        batches = [
            *eval_batches(
                source, SIZE, batch_size=8, workers=0, features=rows if features else None
            ),
            *train_batches(
                source,
                BatchConfig(
                    preprocessing=SIZE, augment="none", batch_size=8, seed=0, stage=0, rows=10
                ),
                epochs=1,
                features=(lambda _: rows) if features else None,
            ),
        ]
        for batch in batches:
            indices = np.asarray(batch.image).reshape(len(batch.mask), -1)[:, 0].astype(int)
            assert batch.target.dtype == np.int32
            expected = LABELS[indices] * batch.mask[:, None]
            np.testing.assert_array_equal(batch.target, expected)
        assert sum(batch.mask.sum() for batch in batches) == 100


def test_fingerprint_depends_on_each_label():
    digests = {fingerprint(SOURCE)}
    for index in np.ndindex(4, 3):
        changed = LABELS.copy()
        changed[index] ^= 1
        digests.add(fingerprint(arrays(IMAGES, changed, CLASSES)))
    assert len(digests) == 13
    assert fingerprint(arrays(IMAGES, LABELS > 0, CLASSES)) == fingerprint(SOURCE)


def test_changes_name_the_label():
    changed = LABELS.copy()
    changed[0, 1] ^= 1
    before, now = (record(Splits(arrays(IMAGES, x, CLASSES), SOURCE)) for x in (LABELS, changed))
    old = LABELS[:, 1].sum()
    assert changes(before, before) == []
    assert changes(before, now) == [f"train: bee {old} then, {changed[:, 1].sum()} now"]


def test_changes_tell_one_hot_labels_from_classes():
    classes = np.arange(50) % 3
    both = [arrays(IMAGES, x, CLASSES) for x in (classes, np.eye(3, dtype=int)[classes])]
    single, several = (record(Splits(x, x)) for x in both)
    assert changes(single, several)[0] == "each image has one class then, several labels now"
    del single["multi_label"]  # as in older checkpoints
    assert changes(single, several)[0] == "each image has one class then, several labels now"
    assert changes(single, record(Splits(both[0], both[0]))) == []
