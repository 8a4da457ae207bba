"""`open_source`: the splits of each kind of spec, split expressions, and error messages."""

import dataclasses
import hashlib
import pickle
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxft.data import Splits, arrays, open_source
from jaxft.errors import DataError

HYMENOPTERA = Path(__file__).parents[2].parent / "shared" / "data" / "hymenoptera"


def save(path: Path, level: int = 0, mode: str = "RGB", size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    gradient = np.add.outer(np.arange(size[1]), np.arange(size[0])) + level
    Image.fromarray(gradient.astype(np.uint8)).convert(mode).save(path)


@pytest.fixture
def root(tmp_path):
    """A folder with 4 training images of `ant` and 3 of `bee`, and 2 validation images of each."""
    for folder, count in {"train/ant": 4, "train/bee": 3, "val/ant": 2, "val/bee": 2}.items():
        for k in range(count):
            save(tmp_path / folder / f"{k}.jpg", level=10 * k)
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
def test_digits_selects_classes(spec, classes, count):
    train, val = open_source(spec)
    assert train.classes == val.classes == classes
    assert len(train) + len(val) == count
    for source in (train, val):
        assert source.targets.dtype == np.int32
        assert set(source.targets) == set(range(len(classes)))
    image, target = val[0]
    assert (image.mode, image.size, target) == ("RGB", (8, 8), val.targets[0])


def test_digits_are_gray_and_scaled_to_255():
    pixels = np.stack([np.asarray(image) for image, _ in open_source("digits:0-1").train])
    assert (pixels == pixels[..., :1]).all()
    assert set(np.unique(pixels)) == {round(v * 255 / 16) for v in range(17)}


def test_digits_split_is_stratified_and_seeded():
    train, val = open_source("digits")
    train_counts, val_counts = np.bincount(train.targets), np.bincount(val.targets)
    assert (train_counts == np.round(0.8 * (train_counts + val_counts))).all()
    np.testing.assert_array_equal(open_source("digits", seed=0).train.images, train.images)
    assert (open_source("digits", seed=1).train.images != train.images).any()


def test_digits_shots_train_and_others_validate():
    train, val = open_source("digits:5-9", shots=4, seed=7)
    assert np.bincount(train.targets).tolist() == [4] * 5
    assert len(train) + len(val) == 896
    larger, _ = open_source("digits:5-9", shots=9, seed=7)
    pixels = {image.tobytes() for image in larger.images}
    assert all(image.tobytes() in pixels for image in train.images)  # fewer are a subset of more


@pytest.mark.parametrize(
    ("spec", "shots", "seed", "digest"),
    [
        ("digits", None, 0, "0bf8ceee72e9"),
        ("digits", None, 1, "603deabc685e"),
        ("digits:5-9", 4, 7, "2d82ba0c8021"),
        ("digits:5-9", 10, 0, "1ea73354e44e"),
        ("digits:0-4", None, 0, "49da5ce10186"),
    ],
)
def test_digits_splits_never_change(spec, shots, seed, digest):
    """Measured results depend on these splits."""
    pixels = hashlib.sha256()
    for source in open_source(spec, shots=shots, seed=seed):
        pixels.update(source.images.tobytes())
        pixels.update(source.targets.tobytes())
    assert pixels.hexdigest()[:12] == digest


# Folders.


def test_folder_sorts_by_name(root):
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
def test_folder_converts_images_to_rgb(root, name, mode):
    save(root / "train/ant" / name, mode=mode)
    train, _ = open_source(f"folder:{root}")
    image, _ = train[[path.name for path in train.files].index(name)]
    assert (image.mode, image.size) == ("RGB", (40, 30))


def test_folder_ignores_hidden_and_other_files(root):
    (root / "train/.ipynb_checkpoints").mkdir()
    (root / "train/ant/._0.jpg").write_bytes(b"macOS")
    (root / "train/ant/notes.txt").write_text("notes")
    (root / "train/README.md").write_text("notes")
    train, _ = open_source(f"folder:{root}")
    assert len(train) == 7


def test_folder_shots_select_from_train_only(root):
    train, val = open_source(f"folder:{root}", shots=2, seed=3)
    assert train.targets.tolist() == [0, 0, 1, 1]
    assert len(val) == 4
    assert open_source(f"folder:{root}", shots=2, seed=3).train.files == train.files
    fewer = open_source(f"folder:{root}", shots=1, seed=3).train
    assert set(fewer.files) < set(train.files)
    selections = {open_source(f"folder:{root}", shots=2, seed=s).train.files for s in range(8)}
    assert len(selections) > 1


@pytest.mark.skipif(not HYMENOPTERA.is_dir(), reason="needs the hymenoptera images")
def test_folder_hymenoptera():
    train, val = open_source(f"folder:{HYMENOPTERA}")
    assert (len(train), len(val), train.classes) == (244, 153, ("ants", "bees"))


# Split selection.


def names(source):
    return [f"{path.parent.name}/{path.stem}" for path in source.files]


@pytest.mark.parametrize(
    ("train", "val", "train_names", "val_names"),
    [
        ("train", "val", "ant/0 ant/1 ant/2 ant/3 bee/0 bee/1 bee/2", "ant/0 ant/1 bee/0 bee/1"),
        ("train[2:-1]", "val[50%:]", "ant/2 ant/3 bee/0 bee/1", "bee/0 bee/1"),
        ("val", "train[:1]", "ant/0 ant/1 bee/0 bee/1", "ant/0"),
        ("train[3:5]", None, "ant/3 bee/0", "ant/0 ant/1 bee/0 bee/1"),
    ],
)
def test_split_expressions(root, train, val, train_names, val_names):
    splits = open_source(f"folder:{root}", train=train, val=val)
    assert [" ".join(names(source)) for source in splits] == [train_names, val_names]


@pytest.mark.parametrize(("train", "count"), [("train+val", 9), ("all", 9), ("val[1/class]", 2)])
def test_split_named_val_does_not_validate_if_it_trains(root, train, count):
    splits = open_source(f"folder:{root}", train=train, seed=1)
    assert len(splits.train) == count
    assert "both train and validate" not in " ".join(splits.remarks)
    for source in splits:
        assert [source[k][1] for k in range(len(source))] == source.targets.tolist()


def test_split_of_a_folder_of_classes_is_random(root):
    for k in range(3, 13):
        save(root / "train/bee" / f"{k}.jpg", level=k)
    splits = open_source(f"folder:{root}/train", seed=2)
    assert np.bincount(splits.train.targets).tolist() == [3, 10]
    assert np.bincount(splits.val.targets).tolist() == [1, 3]
    (remark,) = splits.remarks
    assert "no validation split (it has train)" in remark
    assert "20 % of each class of train, drawn with seed 2, validate, 4 images" in remark
    assert sorted(splits.train.files + splits.val.files) == sorted((root / "train").rglob("*.jpg"))
    assert open_source(f"folder:{root}/train", seed=2).val.files == splits.val.files
    shutil.rmtree(root / "val")
    assert open_source(f"folder:{root}", seed=2).val.files == splits.val.files


def test_split_remainder_of_train_validates(root):
    splits = open_source(f"folder:{root}/train", train="train[2/class]")
    assert np.bincount(splits.val.targets).tolist() == [2, 1]
    assert "the rest of train validates, 3 images" in splits.remarks[0]
    same = open_source(f"folder:{root}/train", shots=2)
    assert (same.train.files, same.val.files) == (splits.train.files, splits.val.files)


def test_split_is_read_only_if_named(root):
    (root / "test").mkdir()
    assert open_source(f"folder:{root}").remarks == ()
    with pytest.raises(DataError, match=r"no class folders in .*test"):
        open_source(f"folder:{root}", val="test")


def test_shots_remark_counts_left_out_images(root):
    splits = open_source(f"folder:{root}", shots=2)
    assert splits.remarks == ("shots=2 trains on 4 of 7 images; the others are left out.",)
    assert open_source(f"folder:{root}", train="train[3/class]", shots=3).remarks == ()


def test_split_remarks_on_overlap_and_missing_classes(root):
    splits = open_source(f"folder:{root}", train="train+val[:1]", val="val[:2]")
    assert splits.remarks == (
        "Images that both train and validate: 1. The validation score is biased.",
        "1 of 2 classes have no images to validate with: bee.",
    )


class_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=5)


def numbered(counts):
    """Returns a shuffled source with `counts` images per class; the pixels of image k encode k."""
    targets = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    images = np.zeros((len(targets), 1, 1, 3), np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.divmod(np.arange(len(targets)), 256)
    return arrays(images, targets, [str(k) for k in range(len(counts))])


def members(source):
    """Returns the numbers of the images of a `numbered` source."""
    return {256 * int(pixel[0, 0, 0]) + int(pixel[0, 0, 1]) for pixel in source.images}


@given(class_sizes.filter(lambda counts: max(counts) > 1), st.integers(0, 9))
def test_random_split_is_disjoint_stratified_and_seeded(counts, seed):
    source = numbered(counts)
    train, val = open_source(source, seed=seed)
    assert members(train) | members(val) == set(range(len(source)))
    assert members(train) & members(val) == set()
    train_counts = np.bincount(train.targets, minlength=len(counts))
    assert (np.abs(train_counts - 0.8 * np.array(counts)) < 1).all()
    assert all(1 <= k < max(2, count) for k, count in zip(train_counts, counts, strict=True))
    assert members(open_source(source, seed=seed).train) == members(train)


@given(class_sizes, st.integers(0, 9), st.data())
def test_per_class_slices_partition_and_nest(counts, seed, data):
    source = numbered(counts)
    cut = data.draw(st.integers(1, min(counts)))
    percent = data.draw(st.integers(50, 99))
    both_splits = Splits(source, source)

    def select(expression):
        return open_source(both_splits, train=expression, seed=seed).train

    some = select(f"train[{cut}/class]")
    assert np.bincount(some.targets).tolist() == [cut] * len(counts)
    assert members(some) == members(select(f"train[:{cut}/class]"))
    assert members(some) == members(open_source(both_splits, shots=cut, seed=seed).train)
    if cut > 1:
        assert members(select(f"train[{cut - 1}/class]")) < members(some)
    expected = [round(count * percent / 100) for count in counts]
    if all(expected) and expected != counts:
        first = open_source(source, train=f"train[:{percent}%/class]", seed=seed)
        rest = open_source(both_splits, val=f"val[{percent}%:/class]", seed=seed).val
        assert np.bincount(first.train.targets).tolist() == expected
        assert members(first.val) == members(rest)


# Sources instead of specs.


def test_open_source_accepts_source_and_splits():
    source = numbered([5, 10])
    splits = open_source(source)
    assert (len(splits.train), len(splits.val)) == (12, 3)
    assert "the data given has no validation split" in splits.remarks[0]
    reopened = open_source(Splits(*splits))
    assert (reopened.train, reopened.val, reopened.remarks) == (splits.train, splits.val, ())


def test_open_source_accepts_minimal_source():
    source = numbered([5, 10])
    splits = open_source(source)

    @dataclasses.dataclass
    class Minimal:
        classes: tuple
        targets: np.ndarray

        def __len__(self):
            return len(self.targets)

        def __getitem__(self, index):
            return source[index]

    minimal = open_source(Minimal(source.classes, source.targets))
    assert minimal.val.targets.tolist() == splits.val.targets.tolist()
    assert minimal.val[1][1] == minimal.val.targets[1]
    assert minimal.val[1][0] == splits.val[1][0]
    joined = open_source(minimal, val="val[:1]+train[:1]", shots=2)
    assert joined.val[0][0] == splits.val[0][0]
    assert joined.val[1][0] == splits.train[0][0]


@pytest.mark.parametrize("train", ["train", "train[:90%/class]", "train+val"])
def test_sources_can_be_pickled(root, train):
    source = open_source(f"folder:{root}", train=train, val="val").train
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.targets == source.targets).all()
    assert copy.classes == source.classes
    assert copy[len(copy) - 1] == source[len(source) - 1]


def test_on_bad_image_skip_leaves_out_unreadable_images(root):
    truncate("train/ant/1.jpg")(root)
    write("val/bee/x.jpg", b"not a picture")(root)
    splits = open_source(f"folder:{root}", on_bad_image="skip")
    assert [len(source) for source in splits] == [6, 4]
    assert names(splits.train) == ["ant/0", "ant/2", "ant/3", "bee/0", "bee/1", "bee/2"]
    (remark,) = splits.remarks
    assert remark.startswith("Left out 2 of 12 images, which cannot be read:\n")
    assert f"{root}/val/bee/x.jpg: not an image" in remark
    joined = open_source(f"folder:{root}", train="train+val", val="val", on_bad_image="skip")
    assert [len(source) for source in joined] == [10, 4]


def test_on_bad_image_skip_keeps_every_class(root):
    truncate("val/bee/0.jpg", "val/bee/1.jpg")(root)
    with pytest.raises(DataError, match=r"none are left of bee \(val\)(.|\n)*bee/1.jpg"):
        open_source(f"folder:{root}", on_bad_image="skip")


# Errors. Each case changes the folder, then opens `spec` ({root} is the folder).


def unchanged(root):
    pass


def remove(*folders):
    return lambda root: [shutil.rmtree(root / folder) for folder in folders]


def empty(*folders):
    def change(root):
        for folder in folders:
            shutil.rmtree(root / folder)
            (root / folder).mkdir()

    return change


def write(file, content):
    return lambda root: (root / file).write_bytes(content)


def truncate(*files):
    def change(root):
        for file in files:
            path = root / file
            path.write_bytes(path.read_bytes()[:-20])

    return change


SPEC_ERRORS = {
    "unknown kind": (unchanged, "hub:cats", None, ["unknown data 'hub:cats'", "folder:PATH"]),
    "near miss": (unchanged, "folders:x", None, ["Did you mean 'folder:x'?"]),
    "near miss in case": (unchanged, "Digits:1", None, ["Did you mean 'digits:1'?"]),
    "a bare path": (unchanged, "{root}", None, ["Did you mean 'folder:{root}'?"]),
    "empty spec": (unchanged, "", None, ["unknown data ''. Data is one of"]),
    "digits, a word": (unchanged, "digits:five", None, ["digits:five", "digits:5-9"]),
    "digits, nothing": (unchanged, "digits:", None, ["digits: names no digits"]),
    "digits, falling": (unchanged, "digits:9-5", None, ["digits:9-5", "rising"]),
    "digits, out of range": (unchanged, "digits:5-12", None, ["digits:5-12", "between 0 and 9"]),
    "digits, too many shots": (
        unchanged,
        "digits:0-1",
        178,
        ["shots=178", "at most 177", "1 must remain", "0 178, 1 182"],
    ),
    "no shots": (unchanged, "digits", 0, ["shots=0", "at least 1"]),
    "too many shots": (unchanged, "folder:{root}", 4, ["shots=4", "at most 3", "bee 3, ant 4"]),
    "no path": (unchanged, "folder:", None, ["names no folder", "folder:PATH"]),
    "no such folder": (
        unchanged,
        "folder:{root}/x",
        None,
        ["there is no folder {root}/x", "train/"],
    ),
    "no train": (remove("train"), "folder:{root}", None, ["no folder train", "its folders: val"]),
    "no folders": (remove("train", "val"), "folder:{root}", None, ["{root} has no folders"]),
    "classes without images": (
        empty("val/ant", "val/bee"),
        "folder:{root}/val",
        None,
        ["no images in {root}/val/ant, {root}/val/bee", "PATH/<class>/"],
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
        remove("val/bee"),
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
        ["{root}/train/bee/x.png: the file is empty"],
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


@pytest.mark.parametrize("case", SPEC_ERRORS)
def test_open_source_spec_error(root, case):
    change, spec, shots, fragments = SPEC_ERRORS[case]
    change(root)
    with pytest.raises(DataError) as caught:
        open_source(spec.format(root=root), shots=shots)
    for fragment in fragments:
        assert fragment.format(root=root) in str(caught.value)


def test_open_source_refuses_images_above_max_pixels(root, monkeypatch):
    monkeypatch.setattr("jaxft.data.decode.MAX_PIXELS", 1100)  # the images have 1200
    with pytest.raises(DataError, match=r"11 of 11 images(.|\n)*40x30 pixels exceeds"):
        open_source(f"folder:{root}")


def test_folder_file_that_becomes_unreadable(root):
    train, _ = open_source(f"folder:{root}")
    train.files[2].unlink()
    with pytest.raises(DataError, match=re.escape(f"{train.files[2]} cannot be read: No")):
        train[2]


SELECTION_ERRORS = {
    "missing split": ({"val": "test"}, ["no split test", "val='test'", "Its splits: train, val"]),
    "no expression": ({"val": ""}, ["split '': '' is not a split"]),
    "no name": ({"train": "[:10]"}, ["'[:10]' is not a split", "write train, train[:80%]"]),
    "no bounds": ({"train": "train[]"}, ["'train[]' has no valid slice"]),
    "a word": ({"train": "train[a:]"}, ["the bound 'a'", "neither an integer nor a percentage"]),
    "a fraction": ({"train": "train[:0.8]"}, ["the bound '0.8'"]),
    "shards": ({"train": "train[:2shard]"}, ["the bound '2shard'"]),
    "several": ({"train": "train[1]+train[5:10%]"}, ["a colon is missing", "mixes examples and"]),
    "a percentage": ({"train": "train[:120%]"}, ["'120%', outside of -100%..100%"]),
    "all, sliced": ({"train": "all[:10]"}, ["slices all splits at once"]),
    "too far": ({"train": "train[:8]"}, ["'train[:8]' exceeds train, which has 7 images"]),
    "too far in a class": ({"train": "train[4/class]"}, ["exceeds some classes", "bee 3, ant 4"]),
    "empty": ({"val": "val[2:2]"}, ["'val[2:2]' is empty", "none of the 4 images of val"]),
    "falling": ({"val": "val[3:1]"}, ["'val[3:1]' is empty"]),
    "a class without training images": (
        {"train": "train[:50%]"},
        ["train='train[:50%]' leaves no images of 1 of 2 classes: bee", "train[:80%/class]"],
    ),
    "on_bad_image": ({"on_bad_image": "ignore"}, ["unknown on_bad_image 'ignore'"]),
}


@pytest.mark.parametrize("case", SELECTION_ERRORS)
def test_open_source_selection_error(root, case):
    options, fragments = SELECTION_ERRORS[case]
    with pytest.raises(DataError) as caught:
        open_source(f"folder:{root}", **options)
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("make_source", "message"),
    [
        (lambda source: numbered([1, 1]), "no image is left to validate with"),
        (
            lambda source: Splits(source, dataclasses.replace(source, classes=("1", "0"))),
            "In another order: train has 0, 1. In another order: val has 1, 0.",
        ),
        (
            lambda source: Splits(
                dataclasses.replace(source, classes=("Cats", "dog")),
                dataclasses.replace(source, classes=("cat", "dog")),
            ),
            r"Only in train: Cats. Only in val: cat. Are these the same: Cats \(train\) and cat",
        ),
        (
            lambda source: Splits(source, numbered([2])),
            "same classes in the same order, but have 0, 1 and 0",
        ),
        (
            lambda source: dataclasses.replace(source, targets=source.targets + 1),
            r"targets of train go from 1 to 2, outside of the 2 classes \(0..1\)",
        ),
        (lambda source: source.take(np.arange(0)), "train has no images"),
    ],
)
def test_open_source_wrong_source_error(make_source, message):
    with pytest.raises(DataError, match=message):
        open_source(make_source(numbered([2, 3])))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Path("data"), "unknown data 'data'"),
        (None, "data is a NoneType, which has no classes. Give a spec such as 'folder:PATH'"),
        ((np.zeros((2, 4, 4, 3), np.uint8), np.arange(2)), "data is a tuple, which has no classes"),
        (SimpleNamespace(classes=["a"], targets=[0], __len__=1, __getitem__=1), "are no array"),
        (Splits(None, None), r"data\.train is a NoneType"),
    ],
    ids=["path", "none", "pair of arrays", "targets in a list", "splits of None"],
)
def test_open_source_not_a_source_error(data, message):
    with pytest.raises(DataError, match=message):
        open_source(data)
