"""Digests of sources: equal for the same images, different for any others, and what is said."""

import dataclasses
import shutil
import unicodedata

import numpy as np
import pytest

from jaxft.data import Cached, Splits, arrays, fingerprint, open_source
from jaxft.data.fingerprint import changes, record
from jaxft.errors import DataError

CLASSES = ("ant", unicodedata.normalize("NFC", "caf\u00e9"))


def save(path, size=30):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), size, np.uint8)).save(path, "BMP")
    path.write_bytes(path.read_bytes() + bytes(size))


@pytest.fixture
def root(tmp_path):
    """Four images of each class to train and two to validate, each of a size of its own."""
    for split, count in {"train": 4, "val": 2}.items():
        for k in range(count):
            for name in CLASSES:
                save(tmp_path / "images" / split / name / f"{k}.bmp", 10 * k)
    return tmp_path / "images"


def of(root, **options):
    train, val = open_source(f"folder:{root}", **options)
    return fingerprint(train), fingerprint(val)


def test_fingerprint_is_of_names_below_the_split_and_not_of_the_place(root, tmp_path):
    first = of(root)
    assert first == of(root)
    assert len(first[0]) == 64
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    assert of(moved) == first
    for split in ("train", "val"):  # as a Mac writes it
        (moved / split / CLASSES[1]).rename(
            moved / split / unicodedata.normalize("NFD", CLASSES[1])
        )
    assert of(moved) == first


def exchange(root):
    ants, others = root / "train/ant/0.bmp", root / "train" / CLASSES[1] / "1.bmp"
    ants.rename(root / "kept")
    others.rename(ants)
    (root / "kept").rename(others)


CHANGES = {
    "one missing": lambda root: (root / "train/ant/3.bmp").unlink(),
    "moved": lambda root: (root / "train/ant/3.bmp").rename(root / "train" / CLASSES[1] / "4.bmp"),
    "exchanged": exchange,
    "renamed": lambda root: (root / "train/ant/3.bmp").rename(root / "train/ant/4.bmp"),
    "another size": lambda root: save(root / "train/ant/3.bmp", 31),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("train", ["train", "train[3/class]", "train+val"])
def test_fingerprint_differs_after(root, change, train):
    before = of(root, train=train, val="val")
    CHANGES[change](root)
    after = of(root, train=train, val="val")
    # Of fewer images than all, those that changed may not be.
    assert after[0] != before[0] or train == "train[3/class]"
    assert after[1] == before[1]


def test_fingerprint_of_arrays_is_of_their_contents():
    images = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
    targets = np.arange(6) % 2
    source = arrays(images, targets, "ab")
    assert fingerprint(source) == fingerprint(arrays(images.copy(), targets, "ab"))
    assert fingerprint(Cached(source, 0)) == fingerprint(source)
    one = images.copy()
    one[3, 2, 1, 0] += 1
    others = [
        arrays(one, targets, "ab"),
        arrays(images, 1 - targets, "ab"),
        arrays(images, targets, "ac"),
        arrays(images[::-1], targets[::-1], "ab"),
        arrays(images.reshape(6, 2, 8, 3), targets, "ab"),
        source.take(np.arange(5)),
    ]
    assert len({fingerprint(other) for other in [source, *others]}) == 7


def test_fingerprint_of_any_other_source_is_of_its_targets():
    @dataclasses.dataclass
    class Minimal:
        classes: tuple
        targets: np.ndarray

        def __len__(self):
            return len(self.targets)

    first, second = np.array([0, 1]), np.array([1, 0])
    assert fingerprint(Minimal(("a", "b"), first)) == fingerprint(Minimal(("a", "b"), first))
    assert fingerprint(Minimal(("a", "b"), first)) != fingerprint(Minimal(("a", "b"), second))


def test_fingerprint_of_a_file_that_is_gone(root):
    train, _ = open_source(f"folder:{root}")
    train.files[0].unlink()
    with pytest.raises(DataError, match=r"0\.bmp can no longer be read: No such file"):
        fingerprint(train)


def recorded(root):
    return record(open_source(f"folder:{root}"))


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ("one missing", ["train: 8 images then, 7 now; ant 4 then, 3 now"]),
        ("moved", [f"train: ant 4 then, 3 now; {CLASSES[1]} 4 then, 5 now"]),
        (
            "renamed",
            [
                "train: as many images of each class, but some are others: names, sizes, contents "
                "or their order differ"
            ],
        ),
    ],
)
def test_changes_between_records(root, change, lines):
    before = recorded(root)
    assert changes(before, recorded(root)) == []
    CHANGES[change](root)
    assert changes(before, recorded(root)) == lines
    # As a version wrote it that had no digests.
    old = {key: before[key] for key in ("train", "val", "classes")}
    assert changes(old, recorded(root)) == [line.split(";")[0] for line in lines if "8 im" in line]


def test_changes_of_classes(root):
    before = recorded(root)
    for split in ("train", "val"):
        (root / split / "ant").rename(root / split / "wasp")
    assert changes(before, recorded(root)) == [
        "classes: 2 then, 2 now; no longer there: ant; new: wasp"
    ]
    images = arrays(np.zeros((2, 4, 4, 3), np.uint8), [0, 1], "ab")
    swapped = dataclasses.replace(images, classes=("b", "a"))
    then, now = (record(Splits(source, source)) for source in (images, swapped))
    assert changes(then, now) == ["classes: 2 then, 2 now: the same in another order"]
