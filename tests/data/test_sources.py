"""Opening data: what a spec gives, and the one error that each mistake gives."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxft.data import open_source
from jaxft.errors import DataError

HYMENOPTERA = Path(__file__).parents[2].parent / "shared" / "data" / "hymenoptera"


def save(path: Path, level: int = 0, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient = np.add.outer(np.arange(size[1]), np.arange(size[0])) + level
    Image.fromarray(gradient.astype(np.uint8)).convert(mode).save(path)


@pytest.fixture
def root(tmp_path):
    """Four images of `ant` and three of `bee` to train, two of each to validate."""
    for place, count in {"train/ant": 4, "train/bee": 3, "val/ant": 2, "val/bee": 2}.items():
        for k in range(count):
            save(tmp_path / place / f"{k}.jpg", level=10 * k)
    return tmp_path


# Digits.


@pytest.mark.parametrize(
    ("spec", "classes", "count"),
    [
        ("digits", tuple("0123456789"), 1797),
        ("digits:5-9", tuple("56789"), 896),
        ("digits:3", ("3",), 183),
    ],
)
def test_digits_of_the_classes_named(spec, classes, count):
    train, val = open_source(spec)
    assert train.classes == val.classes == classes
    assert len(train) + len(val) == count
    for source in (train, val):
        assert source.targets.dtype == np.int32
        assert set(source.targets) == set(range(len(classes)))
    image, target = val[0]
    assert (image.mode, image.size, target) == ("RGB", (8, 8), val.targets[0])


def test_digits_are_spread_over_all_levels_and_gray():
    pixels = np.stack([np.asarray(image) for image, _ in open_source("digits:0-1").train])
    assert (pixels == pixels[..., :1]).all()
    assert set(np.unique(pixels)) == {round(v * 255 / 16) for v in range(17)}


def test_digits_split_is_stratified_and_seeded():
    train, val = open_source("digits")
    n_train, n_val = np.bincount(train.targets), np.bincount(val.targets)
    assert (n_train == np.round(0.8 * (n_train + n_val))).all()
    np.testing.assert_array_equal(open_source("digits", seed=0).train.images, train.images)
    assert (open_source("digits", seed=1).train.images != train.images).any()


def test_digits_shots_train_and_the_rest_validates():
    train, val = open_source("digits:5-9", shots=4, seed=7)
    assert np.bincount(train.targets).tolist() == [4] * 5
    assert len(train) + len(val) == 896
    more, _ = open_source("digits:5-9", shots=9, seed=7)
    rows = {image.tobytes() for image in more.images}
    assert all(image.tobytes() in rows for image in train.images)  # fewer are a subset of more


# Folders.


def test_folder_in_the_order_of_names(root):
    save(root / "train/bee/10.PNG")
    train, val = open_source(f"folder:{root}")
    assert train.classes == val.classes == ("ant", "bee")
    assert [str(path.relative_to(root / "train")) for path in train.files] == [
        *(f"ant/{k}.jpg" for k in range(4)),
        *("bee/0.jpg", "bee/1.jpg", "bee/10.PNG", "bee/2.jpg"),
    ]
    assert train.targets.tolist() == [0] * 4 + [1] * 4
    assert train.targets.dtype == np.int32
    assert val.targets.tolist() == [0, 0, 1, 1]
    assert train[6][1] == 1


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("gray.jpeg", "L"),
        ("cmyk.jpg", "CMYK"),
        ("alpha.png", "RGBA"),
        ("palette.png", "P"),
        ("bits.bmp", "1"),
        ("web.webp", "RGB"),
    ],
)
def test_every_kind_of_image_is_rgb(root, name, mode):
    save(root / "train/ant" / name, mode=mode)
    train, _ = open_source(f"folder:{root}")
    image, _ = train[[path.name for path in train.files].index(name)]
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_hidden_and_other_files_do_not_count(root):
    (root / "train/.ipynb_checkpoints").mkdir()
    (root / "train/ant/._0.jpg").write_bytes(b"macOS")
    (root / "train/ant/notes.txt").write_text("notes")
    (root / "train/README.md").write_text("notes")
    train, _ = open_source(f"folder:{root}")
    assert len(train) == 7


def test_folder_shots_choose_from_train_only(root):
    train, val = open_source(f"folder:{root}", shots=2, seed=3)
    assert train.targets.tolist() == [0, 0, 1, 1]
    assert len(val) == 4
    assert open_source(f"folder:{root}", shots=2, seed=3).train.files == train.files
    fewer = open_source(f"folder:{root}", shots=1, seed=3).train
    assert set(fewer.files) < set(train.files)
    choices = {open_source(f"folder:{root}", shots=2, seed=s).train.files for s in range(8)}
    assert len(choices) > 1


@pytest.mark.skipif(not HYMENOPTERA.is_dir(), reason="needs the hymenoptera images")
def test_hymenoptera():
    train, val = open_source(f"folder:{HYMENOPTERA}")
    assert (len(train), len(val), train.classes) == (244, 153, ("ants", "bees"))


# Mistakes. Each changes the folder, then opens `spec` ({root} is the folder).


def nothing(root):
    pass


def drop(*places):
    return lambda root: [shutil.rmtree(root / place) for place in places]


def empty(*places):
    def change(root):
        for place in places:
            shutil.rmtree(root / place)
            (root / place).mkdir()

    return change


def write(place, content):
    return lambda root: (root / place).write_bytes(content)


def truncate(*places):
    def change(root):
        for place in places:
            path = root / place
            path.write_bytes(path.read_bytes()[:-20])

    return change


MISTAKES = {
    "unknown kind": (nothing, "tfds:cats", None, ["unknown data 'tfds:cats'", "folder:PATH"]),
    "near miss": (nothing, "folders:x", None, ["Did you mean 'folder:x'?"]),
    "near miss in case": (nothing, "Digits:1", None, ["Did you mean 'digits:1'?"]),
    "a bare path": (nothing, "{root}", None, ["Did you mean 'folder:{root}'?"]),
    "empty spec": (nothing, "", None, ["unknown data ''. Data is one of"]),
    "digits, a word": (nothing, "digits:five", None, ["digits:five", "digits:5-9"]),
    "digits, nothing": (nothing, "digits:", None, ["digits: names no digits"]),
    "digits, falling": (nothing, "digits:9-5", None, ["digits:9-5", "rising"]),
    "digits, out of range": (nothing, "digits:5-12", None, ["digits:5-12", "between 0 and 9"]),
    "digits, too many shots": (
        nothing,
        "digits:0-1",
        178,
        ["shots=178", "at most 177", "1 must remain", "0 178, 1 182"],
    ),
    "no shots": (nothing, "digits", 0, ["shots=0", "at least 1"]),
    "too many shots": (nothing, "folder:{root}", 4, ["shots=4", "at most 3", "bee 3, ant 4"]),
    "no path": (nothing, "folder:", None, ["names no folder", "folder:PATH"]),
    "no such folder": (nothing, "folder:{root}/x", None, ["there is no folder {root}/x", "train/"]),
    "no val": (drop("val"), "folder:{root}", None, ["no folder val", "its folders: train"]),
    "neither": (
        drop("train", "val"),
        "folder:{root}",
        None,
        ["no folder train and no folder val", "its folders: none"],
    ),
    "no classes": (empty("train"), "folder:{root}", None, ["no class folders in {root}/train;"]),
    "empty classes": (
        empty("train/bee", "val/ant"),
        "folder:{root}",
        None,
        ["no images in {root}/train/bee, {root}/val/ant"],
    ),
    "classes differ": (
        lambda root: (root / "val/bee").rename(root / "val/wasp"),
        "folder:{root}",
        None,
        ["Only in train: bee", "Only in val: wasp"],
    ),
    "a class too few": (
        drop("val/bee"),
        "folder:{root}",
        None,
        ["Only in train: bee", "Only in val: none"],
    ),
    "truncated JPEG": (
        truncate("train/ant/1.jpg"),
        "folder:{root}",
        None,
        ["1 of 11 images", "{root}/train/ant/1.jpg: image file is truncated"],
    ),
    "text named jpg": (
        write("val/bee/x.jpg", b"not a picture"),
        "folder:{root}",
        None,
        ["1 of 12 images", "{root}/val/bee/x.jpg: not an image"],
    ),
    "empty file": (
        write("train/bee/x.png", b""),
        "folder:{root}",
        None,
        ["{root}/train/bee/x.png: not an image"],
    ),
    "broken link": (
        lambda root: (root / "train/ant/x.jpg").symlink_to("gone.jpg"),
        "folder:{root}",
        None,
        ["{root}/train/ant/x.jpg: No such file or directory"],
    ),
    "several": (
        truncate(*(f"train/ant/{k}.jpg" for k in range(4)), "val/bee/0.jpg", "val/bee/1.jpg"),
        "folder:{root}",
        None,
        ["6 of 11 images", "train/ant/0.jpg", "val/bee/0.jpg", "and 1 more"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake(root, mistake):
    change, spec, shots, fragments = MISTAKES[mistake]
    change(root)
    with pytest.raises(DataError) as caught:
        open_source(spec.format(root=root), shots=shots)
    for fragment in fragments:
        assert fragment.format(root=root) in str(caught.value)


@pytest.mark.parametrize("pixels", [1100, 500], ids=["above the limit", "above twice the limit"])
def test_decompression_bomb(root, monkeypatch, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pixels)  # the images have 1200
    with pytest.raises(DataError, match=r"11 of 11 images(.|\n)*decompression bomb"):
        open_source(f"folder:{root}")


def test_file_that_becomes_unreadable(root):
    train, _ = open_source(f"folder:{root}")
    train.files[2].unlink()
    with pytest.raises(DataError, match=re.escape(f"{train.files[2]} can no longer be read: No")):
        train[2]
