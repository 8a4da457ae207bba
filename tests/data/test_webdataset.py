"""`webdataset:PATH`: images in tar files, their classes and splits, and error messages."""

import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image
from test_tar_index import write_tar

from jaxft.data import BatchConfig, Preprocessing, fingerprint, open_source, train_batches
from jaxft.data.open_source import open_collection
from jaxft.data.process_source import in_processes
from jaxft.errors import DataError


def png(level):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


def sample(level, label=None, extension="cls"):
    """Returns the files of a sample whose class is even or odd."""
    label = ("even", "odd")[level % 2] if label is None else label
    content = json.dumps(label) if extension == "json" else str(label)
    return [(f"{level:04}.png", png(level)), (f"{level:04}.{extension}", content.encode())]


def shard(path, levels, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, [file for level in levels for file in sample(level, **options)])


def levels(source):
    return [int(np.asarray(source[k][0])[0, 0, 0]) for k in range(len(source))]


@pytest.fixture
def root(tmp_path):
    """Shards 008 to 011 with 4 images each."""
    for k in range(4):
        shard(tmp_path / f"shard-{k + 8:03}.tar", range(4 * k, 4 * k + 4))
    return tmp_path


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("shard-{008..011}.tar", range(16)),
        ("shard-0{10..11}.tar", range(8, 16)),
        ("shard-0{0..1}{1..1}.tar", range(12, 16)),
        ("shard-009.tar", range(4, 8)),
        ("", range(16)),
    ],
    ids=["range", "part", "two ranges", "one shard", "folder"],
)
def test_webdataset_reads_shards_in_order(place, expected, root):
    if "}{" in place:
        shard(root / "shard-001.tar", range(100, 102))
        expected = [100, 101, *expected]
    train, val = open_source(f"webdataset:{root}/{place}", train="train", val="train")
    assert levels(train) == levels(val) == list(expected)
    assert train.classes == ("even", "odd")
    assert train.targets.tolist() == [level % 2 for level in expected]
    assert train.targets.dtype == np.int32
    assert train[1][0].mode == "RGB"


@pytest.mark.parametrize(
    "names",
    [("train/{:03}.tar", "val/{:03}.tar"), ("set-train-{:03}.tar", "set-val-{:03}.tar")],
    ids=["folders", "names"],
)
def test_webdataset_splits_a_folder(names, tmp_path):
    for k in range(2):
        shard(tmp_path / names[0].format(k), range(4 * k, 4 * k + 4))
    shard(tmp_path / names[1].format(0), [10, 11])
    train, val = open_source(f"webdataset:{tmp_path}")
    assert (levels(train), levels(val)) == (list(range(8)), [10, 11])


@pytest.mark.parametrize(
    ("label", "extension", "name"),
    [
        (7, "cls", "7"),
        ("ant\n", "cls", "ant"),
        (7, "json", "7"),
        ("ant", "json", "ant"),
        ({"caption": "x", "label": 3}, "json", "3"),
        ({"cls": "ant", "label": 3}, "json", "ant"),
    ],
)
def test_webdataset_reads_classes(label, extension, name, tmp_path):
    shard(tmp_path / "x.tar", range(3), label=label, extension=extension)
    source = open_collection(f"webdataset:{tmp_path}/x.tar").read(["train"])["train"]
    assert source.classes == (name,)


def test_webdataset_classes_are_those_of_all_splits(tmp_path):
    shard(tmp_path / "train-0.tar", range(3), label=10)
    shard(tmp_path / "val-0.tar", range(3), label=9)
    for split, target in (("train", 1), ("val", 0)):
        source = open_collection(f"webdataset:{tmp_path}").read([split])[split]
        assert source.classes == ("9", "10")
        assert source.targets.tolist() == [target] * 3


@pytest.mark.parametrize(
    "files",
    [
        {"cls": b"1"},
        {"png": b""},
        {"png": b"", "jpg": b"", "cls": b"1"},
        {"png": b"", "cls": b" "},
        {"png": b"", "cls": b"\xff"},
        {"png": b"", "json": b"{"},
        {"png": b"", "json": b"{}"},
        {"png": b"", "json": b"true"},
    ],
    ids=["no image", "no class", "two images", "empty", "bytes", "damaged", "no field", "bool"],
)
def test_webdataset_lists_samples_without_image_or_class(files, tmp_path):
    named = [(f"a.{extension}", content) for extension, content in files.items()]
    write_tar(tmp_path / "x.tar", [*sample(0), *named])
    with pytest.raises(DataError, match=r"x\.tar: 1 of 2 samples do not have(.|\n)*\n  a \("):
        open_source(f"webdataset:{tmp_path}/x.tar")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "data 'webdataset:' names no shards: give webdataset:PATH/"),
        (
            "{root}/shard-{{008..013}}.tar",
            r"2 of 6 shards do not exist(.|\n)*-012.tar",
        ),
        ("{root}/shard-{{011..008}}.tar", "names no shards"),
        ("{root}/empty", r"empty holds no \.tar files: give webdataset:PATH/"),
        ("{root}/packed", r"packed holds no \.tar files; unpack a\.tar\.gz to plain \.tar files"),
        ("{root}/mixed", r"have a split \(val\), and those of b\.tar have none"),
    ],
)
def test_webdataset_of_other_places(place, message, root):
    for name in ("empty/x", "packed/a.tar.gz", "mixed/a-val.tar", "mixed/b.tar"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).touch()
    with pytest.raises(DataError, match=message):
        open_source(f"webdataset:{place.format(root=root)}")


def test_webdataset_reports_unreadable_images(root):
    path = root / "shard-009.tar"
    path.write_bytes(path.read_bytes().replace(b"IHDR", b"RDHI", 1))
    with pytest.raises(DataError, match=r"1 of 16 images(.|\n)*shard-009\.tar/0004\.png: not an"):
        open_source(f"webdataset:{root}")
    assert sum(map(len, open_source(f"webdataset:{root}", on_bad_image="skip"))) == 15
    train, _ = open_source(f"webdataset:{root}", train="train[8:]", val="train[8:]")
    (root / "shard-011.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"shard-011\.tar/0012\.png cannot be read: the shard is"):
        train[4]


def test_webdataset_fingerprint_covers_names_and_sizes(root):
    first = fingerprint(open_source(f"webdataset:{root}").train)
    assert fingerprint(open_source(f"webdataset:{root}").train) == first
    shard(root / "shard-008.tar", [20, 1, 2, 3])
    assert fingerprint(open_source(f"webdataset:{root}").train) != first


def test_webdataset_batches_are_the_same_in_worker_processes(root):
    train, _ = open_source(f"webdataset:{root}")
    assert levels(pickle.loads(pickle.dumps(train))) == levels(train)
    config = BatchConfig(
        preprocessing=Preprocessing(image_size=8, resize_size=8),
        augment="crop_flip", batch_size=5, seed=1, stage=0,
    )  # fmt: skip
    (pooled,) = in_processes([train], 2)
    batches = [list(train_batches(each, config, epochs=2)) for each in (train, pooled)]
    pooled.workers.close()
    rest = list(train_batches(train, config, epochs=2, first_epoch=1, first_step=1))
    assert len(rest) == len(batches[0]) // 2 - 1
    resumed = batches[0][: -len(rest)] + rest
    for ours, *others in zip(*batches, resumed, strict=True):
        for theirs in others:
            np.testing.assert_array_equal(ours.image, theirs.image)
            np.testing.assert_array_equal(ours.target, theirs.target)
