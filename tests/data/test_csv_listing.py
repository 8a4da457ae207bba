"""`csv:FILE` and `split_by`: images, classes and splits that CSV files list."""

import pickle

import numpy as np
import pytest
from PIL import Image

from jaxft.data import fingerprint, open_source
from jaxft.errors import DataError

NAMES = [f"{name}/{k}.png" for name in ("ant", "bee") for k in range(4)]


@pytest.fixture
def root(tmp_path):
    """A folder with 4 images of `ant` and of `bee`."""
    for level, name in enumerate(NAMES):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / "images" / name)
    return tmp_path


def write(root, header, rows, name="list.csv"):
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    (root / name).write_text("\n".join(lines) + "\n")
    return str(root / name)


def listing(root, names=NAMES):
    return write(root, "path,label", [(f"images/{name}", name.split("/")[0]) for name in names])


def levels(source):
    return [int(np.asarray(source[k][0])[0, 0, 0]) for k in range(len(source))]


def test_csv_has_the_images_of_the_folder(root):
    expected, found = open_source(f"folder:{root}/images"), open_source(f"csv:{listing(root)}")
    for split, other in zip(found, expected, strict=True):
        assert split.classes == other.classes == ("ant", "bee")
        assert split.files == other.files
        assert fingerprint(split) == fingerprint(other)
        assert levels(pickle.loads(pickle.dumps(split))) == levels(other)


def test_csv_keeps_its_order(root):
    order = [5, 0, 3, 6, 1]
    path = listing(root, [NAMES[k] for k in order])
    train, val = open_source(f"csv:{path}", train="train[:4]", val="train[4:]")
    assert levels(train) + levels(val) == order
    assert train.targets.tolist() == [1, 0, 0, 1]
    assert train.targets.dtype == np.int32


def test_csv_splits_by_its_column(root):
    rows = [(f"images/{name}", name[:3], "val" if "/3" in name else "train") for name in NAMES]
    train, val = open_source(f"csv:{write(root, 'path,label,split', rows)}")
    assert levels(val) == [3, 7]
    assert levels(train) == [0, 1, 2, 4, 5, 6]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["10", "9", "2", "9"], ("2", "9", "10")),
        (["b", "10", "9", "B"], ("10", "9", "B", "b")),
        (["e\u0301", "\u00e9", "f", "f"], ("f", "\u00e9")),  # composed and decomposed
    ],
)
def test_csv_sorts_classes(labels, classes, root):
    rows = [(f"images/{name}", label) for name, label in zip(NAMES, labels, strict=False)]
    train, _ = open_source(f"csv:{write(root, 'path,label', rows)}", train="train", val="train")
    assert train.classes == classes


def test_csv_reports_unreadable_images(root):
    (root / "images" / NAMES[2]).write_text("no image")
    with pytest.raises(DataError, match=r"1 of 8 images cannot be read(.|\n)*ant/2.png: not an"):
        open_source(f"csv:{listing(root)}")
    assert sum(map(len, open_source(f"csv:{listing(root)}", on_bad_image="skip"))) == 7


def splits_file(root, names, place="images/"):
    rows = [(f"{place}{name}", "val" if "/0" in name else "train") for name in names]
    return write(root, "path,split", rows, "splits.csv")


@pytest.mark.parametrize("kind", ["folder", "csv"])
def test_split_by_assigns_images_to_splits(kind, root):
    spec = f"folder:{root}/images" if kind == "folder" else f"csv:{listing(root)}"
    splits = open_source(spec, split_by=splits_file(root, NAMES[::-1]))
    assert levels(splits.train) == [7, 6, 5, 3, 2, 1]
    assert levels(splits.val) == [4, 0]
    assert splits.val.targets.tolist() == [1, 0]
    assert splits.remarks == ()


def test_split_by_joins_and_renames_the_splits_of_a_folder(root):
    for split in ("train", "val"):
        for name in NAMES[::2]:
            target = root / "set" / split / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((root / "images" / name).read_bytes())
    names = [f"val/{NAMES[0]}", f"train/{NAMES[2]}", f"val/{NAMES[4]}", f"train/{NAMES[6]}"]
    splits = open_source(f"folder:{root}/set", split_by=splits_file(root, names, "set/"))
    assert levels(splits.train) == [2, 6]
    assert levels(splits.val) == [0, 4]
    path = root / "splits.csv"
    assert splits.remarks == (f"4 of 8 images are left out: {path} lacks them.",)


def test_split_by_rejects_other_images_and_sources(root):
    Image.new("RGB", (8, 8)).save(root / "other.png")
    path = write(root, "path,split", [("images/" + NAMES[0], "train"), ("other.png", "val")])
    with pytest.raises(DataError, match=r"no images of .*/images, in 1 of 2 lines:\n  line 3: oth"):
        open_source(f"folder:{root}/images", split_by=path)
    with pytest.raises(DataError, match="digits does not consist of image files on a disk"):
        open_source("digits", split_by=path)
    with pytest.raises(DataError, match=r"split_by=gone\.csv: there is no such file"):
        open_source("digits", split_by="gone.csv")


def test_open_source_suggests_csv(root):
    with pytest.raises(DataError, match=r"Did you mean 'csv:.*list\.csv'"):
        open_source(listing(root))
