"""Folder data sets: which files are images, which folders are classes, and the error messages."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxft.data import open_source
from jaxft.data.fingerprint import record
from jaxft.errors import DataError

IMAGE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))


def save(path: Path, image_format: str = "PNG") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    IMAGE.save(path, image_format)


def fill(root: Path, *folders: str, count: int = 2, suffix: str = ".png") -> Path:
    """Saves `count` images in each of the folders."""
    for folder in folders:
        for k in range(count):
            save(root / folder / f"{k}{suffix}")
    return root


@pytest.fixture
def root(tmp_path):
    return fill(tmp_path / "data", "train/ant", "train/bee", "val/ant", "val/bee")


def open_folder(root, **options):
    return open_source(f"folder:{root}", **options)


def train_files(root):
    """Returns the training files below the split's folder, and the number of images per class."""
    train = open_folder(root).train
    names = [path.relative_to(train.root).as_posix() for path in train.files]
    return names, np.bincount(train.targets).tolist()


# Image files.


@pytest.mark.parametrize(
    ("suffix", "image_format"),
    [
        *((".JPG", "JPEG"), (".jpe", "JPEG"), (".jfif", "JPEG"), (".mpo", "MPO")),
        *((".tif", "TIFF"), (".TIFF", "TIFF"), (".gif", "GIF"), (".ppm", "PPM"), (".bmp", "BMP")),
        *((".webp", "WEBP"), (".tga", "TGA"), (".ico", "ICO"), (".pcx", "PCX"), (".dib", "DIB")),
    ],
)
def test_folder_reads_pillow_formats(root, suffix, image_format):
    save(root / f"train/ant/x{suffix}", image_format)
    splits = open_folder(root)
    assert np.bincount(splits.train.targets).tolist() == [3, 2]
    assert splits.remarks == ()
    assert splits.train[2][0].mode == "RGB"


@pytest.mark.parametrize(("suffix", "image_format"), [(".avif", "AVIF"), (".jp2", "JPEG2000")])
def test_folder_reads_optional_pillow_formats(root, suffix, image_format):
    Image.init()
    if image_format not in Image.SAVE:
        pytest.skip(f"Pillow is built without {image_format}")
    save(root / f"train/ant/x{suffix}", image_format)
    assert len(open_folder(root).train) == 5


def test_folder_counts_other_files_by_suffix(root):
    for k in range(3):
        (root / f"train/ant/{k}.heic").write_bytes(b"heic")
    for name in ("train/bee/notes.TXT", "train/bee/labels", "train/bee/x.eps", "val/bee/clip.mp4"):
        (root / name).write_bytes(b"else")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):  # ignored
        (root / "train/ant" / name).write_bytes(b"else")
    save(root / "train/__MACOSX/ant/._0.png")
    save(root / "val/ant/@eaDir/0.png/thumbnail.png")
    assert open_folder(root).remarks == (
        "train: 6 files are not images that can be read here and are left out: .heic (3), "
        "without a suffix (1), .txt (1), .eps (1).",
        "val: 1 file is not an image that can be read here and is left out: .mp4 (1).",
    )


def test_folder_counts_loose_images(root):
    for name in ("train/stray.png", "x.png", "y.png"):
        save(root / name)
    (root / "train/labels.csv").write_text("a table")
    assert open_folder(root).remarks == (
        "train: 1 image lies outside of the class folders and is left out: stray.png.",
        f"{root}: 2 images lie outside of the folders of the splits and are left out: x.png, "
        "y.png.",
    )


def test_folder_error_for_class_without_images_counts_its_files(root):
    shutil.rmtree(root / "val/bee")
    (root / "val/bee").mkdir()
    (root / "val/bee/0.heic").write_bytes(b"heic")
    with pytest.raises(DataError, match=r"no images in .*/val/bee \(\.heic \(1\)\)\. Add some"):
        open_folder(root)


# Nested folders and links.


def test_folder_reads_nested_images(root):
    fill(root, "train/ant/session2", "train/ant/session2/b", "train/ant/session1", count=1)
    fill(root, "train/ant/.hidden", count=1)
    names, counts = train_files(root)
    assert names[:5] == [
        *("ant/0.png", "ant/1.png"),
        *("ant/session1/0.png", "ant/session2/0.png", "ant/session2/b/0.png"),
    ]
    assert counts == [5, 2]


def test_folder_follows_links_without_cycles(root, tmp_path):
    fill(tmp_path, "elsewhere/bees", "elsewhere/more")
    shutil.rmtree(root / "train/bee")
    (root / "train/bee").symlink_to(tmp_path / "elsewhere/bees")
    (root / "train/bee/more").symlink_to(tmp_path / "elsewhere/more")
    (root / "train/ant/self").symlink_to(".")
    (root / "train/ant/up").symlink_to(root)
    (tmp_path / "elsewhere/bees/split").symlink_to(root / "train")
    names, counts = train_files(root)
    assert counts == [2, 4]
    assert names[2:] == ["bee/0.png", "bee/1.png", "bee/more/0.png", "bee/more/1.png"]


def test_folder_broken_link_to_class_is_an_error(root):
    (root / "train/cat").symlink_to("/mnt/unmounted/cat")
    with pytest.raises(DataError, match=r"train/cat is a link to /mnt/unmounted/cat, which is not"):
        open_folder(root)


def test_folder_broken_link_in_unused_split_is_ignored(root):
    (root / "test").mkdir()
    (root / "test/cat").symlink_to("/mnt/unmounted/cat")
    assert len(open_folder(root).train) == 4


def test_folder_link_to_itself_is_broken(root):
    (root / "train/ant/x").symlink_to("x")
    with pytest.raises(DataError, match=r"ant/x: .* \(a link to x\)"):
        open_folder(root)
    (root / "train/x").symlink_to("x")
    with pytest.raises(DataError, match="train/x is a link to x, which is not there"):
        open_folder(root)


@pytest.mark.parametrize("name", ["x.png", "session2", "v1.0"])
def test_folder_broken_link_to_file_is_an_error_or_skipped(root, name):
    (root / "train/ant" / name).symlink_to("/mnt/gone")
    with pytest.raises(DataError, match=rf"ant/{name}: No such file .*\(a link to /mnt/gone\)"):
        open_folder(root)
    skipped = open_folder(root, on_bad_image="skip")
    assert len(skipped.train) == 4
    assert f"ant/{name}: No such file or directory" in skipped.remarks[0]


def test_folder_does_not_open_named_pipe(root):
    os.mkfifo(root / "train/ant/x.png")
    assert open_folder(root).remarks[0].endswith("left out: .png (1).")


# File and folder names.


CAFE = {form: unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD")}


def test_folder_class_names_are_normalized_unicode(tmp_path):
    root = fill(tmp_path, f"train/{CAFE['NFC']}", "train/tea", f"val/{CAFE['NFD']}", "val/tea")
    train, val = open_folder(root)
    assert train.classes == val.classes == (CAFE["NFC"], "tea")
    fill(root, f"train/{CAFE['NFD']}")
    with pytest.raises(DataError, match="two folders called caf\u00e9, one with composed"):
        open_folder(root)


def test_folder_names_with_invalid_utf8_are_printable(tmp_path):
    root = os.fsencode(fill(tmp_path / "data", "train/b", "val/b"))
    for split in (b"train", b"val"):
        os.makedirs(os.path.join(root, split, b"caf\xe9"))
        for name in (b"ni\xf1o.png", b"x.png"):
            with open(os.path.join(root, split, b"caf\xe9", name), "wb") as file:
                IMAGE.save(file, "PNG")
    with open(os.path.join(root, b"val", b"caf\xe9", b"\xf1.t\xe9xt"), "wb"):
        pass
    splits = open_folder(os.fsdecode(root))
    assert splits.train.classes == ("b", r"caf\xe9")
    assert r".t\xe9xt (1)" in splits.remarks[0]
    json.dumps(record(splits), ensure_ascii=False).encode("utf-8")
    for path in splits.train.files:
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"ni\\xf1o\.png: not an image") as caught:
        open_folder(os.fsdecode(root))
    str(caught.value).encode("utf-8")


def test_folder_names_with_control_characters_are_printable(tmp_path):
    root = fill(tmp_path / "data", "train/a\nb", "train/c", "val/a\nb", "val/c")
    assert open_folder(root).train.classes == (r"a\nb", "c")
    (root / "val/c/\x1b[31m.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"val/c/\\x1b\[31m\.png: the file is empty"):
        open_folder(root)


# Layouts. Each error names the expected layout and the folders that are there.


def only(*folders, count=2):
    """Returns a function that replaces the data set by images in these folders."""

    def change(root):
        shutil.rmtree(root)
        fill(root, *folders, count=count)

    return change


def also(*folders):
    """Returns a function that adds images in these folders to the data set."""
    return lambda root: fill(root, *folders)


LAYOUTS = {
    "splits in capitals": (
        only("Train/a", "Train/b", "Val/a", "Val/b"),
        ["no split train; its splits: Train, Val", "--train-split Train", "rename it to train"],
    ),
    "splits by other names": (
        only("training/a", "training/b", "validation/a", "validation/b"),
        ["its splits: training, validation", "train='training'"],
    ),
    "one folder too deep": (
        only("images/train/a", "images/train/b"),
        ["data holds images, and images holds train: did you mean folder:{root}/images?"],
    ),
    "one folder too deep, with another folder": (
        lambda root: (
            only("images/train/a", "images/train/b", "docs/pictures")(root),
            (root / "images/README.md").write_text("notes"),
        ),
        ["holds docs, images, and images holds train: did you mean folder:{root}/images?"],
    ),
    "classes one folder too deep": (
        only("images/a", "images/b"),
        ["a single class folder, images, which holds no images but the folders a, b", "one folder"],
    ),
    "classes of the splits one folder too deep": (
        only("train/images/a", "train/images/b", "val/images/a", "val/images/b"),
        ["{root}/train has a single class folder, images", "out of {root}/train/images"],
    ),
    "splits within classes": (
        only("a/train", "a/val", "b/train", "b/val"),
        ["holds a, b, and a holds train and val: these are splits within classes"],
    ),
    "a class called train, with folders": (
        only("bus/1", "bus/2", "car/3", "train/4", "train/5"),
        ["its folder train holds folders, as a split does, but bus, car look like classes"],
    ),
    "files without folders": (
        only("", count=6),
        ["{root} has no folders", "6 images lie there outside of any, such as 0.png"],
    ),
    "files in a split": (
        only("train", count=1),
        ["no class folders in {root}/train, but an image lies there outside of any, such as 0.png"],
    ),
    "validation only": (only("val/a", "val/b"), ["no folder train; its folders: val"]),
    "a class without training images": (
        also("val/cat"),
        ["must have the same class folders. Only in train: none. Only in val: cat."],
    ),
    "a class without validation images": (
        also("train/cat"),
        ["Only in train: cat. Only in val: none."],
    ),
    "a class name with a trailing space": (
        lambda root: (root / "val/bee").rename(root / "val/bee "),
        ["Only in val: 'bee '. Are these the same: bee (train) and 'bee ' (val)?"],
    ),
    "different spellings of a class": (
        also("train/house_cat", "val/House cat", "val/zebra"),
        [
            "Only in train: house_cat. Only in val: House cat, zebra. Are these the same: "
            "house_cat (train) and House cat (val)? Then rename one of each."
        ],
    ),
    "a file": (
        lambda root: (shutil.rmtree(root), root.write_bytes(b"zip")),
        ["{root} is a file, not a folder", "PATH/train/<class>/"],
    ),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_folder_layout_error(root, case):
    change, fragments = LAYOUTS[case]
    change(root)
    with pytest.raises(DataError) as caught:
        open_folder(root)
    for fragment in fragments:
        assert fragment.format(root=root) in str(caught.value)


@pytest.mark.parametrize(
    ("folders", "options", "classes", "counts"),
    [
        (("Train/a", "Train/b", "Val/a", "Val/b"), {"train": "Train"}, ("a", "b"), (4, 4)),
        (("training/a", "training/b", "validation/a", "validation/b"), {"train": "training"},
         ("a", "b"), (4, 4)),
        (("train/a", "train/b", "valid/a", "valid/b", "test/a"), {}, ("a", "b"), (4, 4)),
        (("bus", "car", "train"), {}, ("bus", "car", "train"), (3, 3)),
        (("train/a", "train/b", "test"), {}, ("a", "b"), (2, 2)),
        (("train/a", "train/b", "extra/a", "extra/b"), {}, ("a", "b"), (2, 2)),
        (("train/a", "train/b", "docs", "docs/icons"), {}, ("a", "b"), (2, 2)),
    ],
)  # fmt: skip
def test_folder_layout(tmp_path, folders, options, classes, counts):
    train, val = open_folder(fill(tmp_path, *folders), **options)
    assert train.classes == val.classes == classes
    assert (len(train), len(val)) == counts


def test_folder_second_validation_split_is_left_out(root):
    fill(root, "validation/ant", "validation/bee")
    assert open_folder(root).remarks == (f"{root}: val validates, validation is left out.",)
    assert open_folder(root, val="validation").remarks == ()
