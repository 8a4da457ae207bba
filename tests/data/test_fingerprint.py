"""Fingerprints: equal for equal images, different otherwise, and the messages on resume."""

import dataclasses
import shutil
import unicodedata

import numpy as np
import pytest

from jaxft.data import Cached, Splits, arrays, fingerprint, open_source
from jaxft.data.fingerprint import changes, record
from jaxft.data.process_source import in_processes
from jaxft.errors import DataError

CLASSES = ("ant", unicodedata.normalize("NFC", "caf\u00e9"))


def save(path, size=30):
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 4, 3), size, np.uint8)).save(path, "BMP")
    path.write_bytes(path.read_bytes() + bytes(size))


@pytest.fixture
def root(tmp_path):
    """A folder with 4 training and 2 validation images per class, all of different file sizes."""
    for split, count in {"train": 4, "val": 2}.items():
        for k in range(count):
            for name in CLASSES:
                save(tmp_path / "images" / split / name / f"{k}.bmp", 10 * k)
    return tmp_path / "images"


def fingerprints(root, **options):
    """Returns the fingerprints of the training and validation images."""
    train, val = open_source(f"folder:{root}", **options)
    return fingerprint(train), fingerprint(val)


def test_fingerprint_depends_on_paths_below_the_split_only(root, tmp_path):
    first = fingerprints(root)
    assert first == fingerprints(root)
    assert len(first[0]) == 64
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    assert fingerprints(moved) == first
    for split in ("train", "val"):  # decomposed letters, as on macOS
        (moved / split / CLASSES[1]).rename(
            moved / split / unicodedata.normalize("NFD", CLASSES[1])
        )
    assert fingerprints(moved) == first


def exchange(root):
    first, second = root / "train/ant/0.bmp", root / "train" / CLASSES[1] / "1.bmp"
    first.rename(root / "temporary")
    second.rename(first)
    (root / "temporary").rename(second)


CHANGES = {
    "one missing": lambda root: (root / "train/ant/3.bmp").unlink(),
    "moved": lambda root: (root / "train/ant/3.bmp").rename(root / "train" / CLASSES[1] / "4.bmp"),
    "exchanged": exchange,
    "renamed": lambda root: (root / "train/ant/3.bmp").rename(root / "train/ant/4.bmp"),
    "another size": lambda root: save(root / "train/ant/3.bmp", 31),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("train", ["train", "train[3/class]", "train+val"])
def test_fingerprint_detects_change(root, change, train):
    before = fingerprints(root, train=train, val="val")
    CHANGES[change](root)
    after = fingerprints(root, train=train, val="val")
    # A selection of the images may not include the changed ones.
    assert after[0] != before[0] or train == "train[3/class]"
    assert after[1] == before[1]


def test_fingerprint_of_arrays_depends_on_pixels_and_targets():
    images = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
    targets = np.arange(6) % 2
    source = arrays(images, targets, "ab")
    assert fingerprint(source) == fingerprint(arrays(images.copy(), targets, "ab"))
    assert fingerprint(Cached(source, 0)) == fingerprint(source)
    assert fingerprint(in_processes([source], 2)[0]) == fingerprint(source)
    one_pixel_changed = images.copy()
    one_pixel_changed[3, 2, 1, 0] += 1
    others = [
        arrays(one_pixel_changed, targets, "ab"),
        arrays(images, 1 - targets, "ab"),
        arrays(images, targets, "ac"),
        arrays(images[::-1], targets[::-1], "ab"),
        arrays(images.reshape(6, 2, 8, 3), targets, "ab"),
        source.take(np.arange(5)),
    ]
    assert len({fingerprint(other) for other in [source, *others]}) == 7


def test_fingerprint_of_minimal_source_depends_on_targets():
    @dataclasses.dataclass
    class Minimal:
        classes: tuple
        targets: np.ndarray

        def __len__(self):
            return len(self.targets)

    first, second = np.array([0, 1]), np.array([1, 0])
    assert fingerprint(Minimal(("a", "b"), first)) == fingerprint(Minimal(("a", "b"), first))
    assert fingerprint(Minimal(("a", "b"), first)) != fingerprint(Minimal(("a", "b"), second))


def test_fingerprint_of_missing_file_is_an_error(root):
    train, _ = open_source(f"folder:{root}")
    train.files[0].unlink()
    with pytest.raises(DataError, match=r"0\.bmp cannot be read: No such file"):
        fingerprint(train)


def record_of(root):
    return record(open_source(f"folder:{root}"))


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        ("one missing", ["train: 8 images then, 7 now; ant 4 then, 3 now"]),
        ("moved", [f"train: ant 4 then, 3 now; {CLASSES[1]} 4 then, 5 now"]),
        (
            "renamed",
            [
                "train: as many images of each class, but some are different (name, size, content "
                "or order)"
            ],
        ),
    ],
)
def test_fingerprint_changes(root, change, lines):
    before = record_of(root)
    assert changes(before, record_of(root)) == []
    CHANGES[change](root)
    assert changes(before, record_of(root)) == lines
    # A record without counts and fingerprints, from an older version.
    old = {key: before[key] for key in ("train", "val", "classes")}
    assert changes(old, record_of(root)) == [line.split(";")[0] for line in lines if "8 im" in line]


def test_fingerprint_changes_of_classes(root):
    before = record_of(root)
    for split in ("train", "val"):
        (root / split / "ant").rename(root / split / "wasp")
    assert changes(before, record_of(root)) == [
        "classes: 2 then, 2 now; no longer there: ant; new: wasp"
    ]
    images = arrays(np.zeros((2, 4, 4, 3), np.uint8), [0, 1], "ab")
    swapped = dataclasses.replace(images, classes=("b", "a"))
    before, now = (record(Splits(source, source)) for source in (images, swapped))
    assert changes(before, now) == ["classes: 2 then, 2 now: the same in another order"]
