"""`hf_dataset:PATH`: data sets of Hugging Face's `datasets`, saved to disk or as parquet files."""

import io
import pickle
import re
import sys

import numpy as np
import pytest
from PIL import Image

from jaxft.data import BatchConfig, Preprocessing, fingerprint, open_source, train_batches
from jaxft.data.open_source import open_collection
from jaxft.data.process_source import in_processes
from jaxft.errors import DataError

datasets = pytest.importorskip("datasets")

CLASSES = ("ant", "bee")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def png(level):
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(file, "PNG")
    return file.getvalue()


def dataset(levels, *, columns=None, label=None):
    label = label or datasets.ClassLabel(names=list(CLASSES))
    values = {
        "image": [{"bytes": png(level), "path": f"{level}.png"} for level in levels],
        "label": [level % 2 for level in levels],
        "caption": ["a picture"] * len(levels),
    }
    features = {
        "image": datasets.Image(),
        "label": label,
        "caption": datasets.Value("string"),
    }
    for old, new in (columns or {}).items():
        values[new], features[new] = values.pop(old), features.pop(old)
    return datasets.Dataset.from_dict(values, features=datasets.Features(features))


def levels(source):
    return [int(np.asarray(source[k][0])[0, 0, 0]) for k in range(len(source))]


@pytest.fixture
def saved(tmp_path):
    """A saved set with 6 images to train on and 2 to validate."""
    sets = {"train": dataset(range(6)), "val": dataset([10, 11])}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "set")
    return tmp_path / "set"


def test_hf_dataset_reads_saved_splits(saved):
    train, val = open_source(f"hf_dataset:{saved}")
    assert train.classes == val.classes == CLASSES
    assert levels(train) == [0, 1, 2, 3, 4, 5]
    assert levels(val) == [10, 11]
    assert train.targets.tolist() == [0, 1, 0, 1, 0, 1]
    assert train.targets.dtype == np.int32
    assert train[3][1] == 1
    assert train[3][0].mode == "RGB"
    again, other = open_source(f"hf_dataset:{saved}")
    assert fingerprint(again) == fingerprint(train)
    assert fingerprint(other.take(np.array([1, 0]))) != fingerprint(val)


def test_hf_dataset_reads_a_single_saved_split(tmp_path):
    dataset(range(20)).select(range(19, -1, -1)).save_to_disk(tmp_path / "set")  # in another order
    train, val = open_source(f"hf_dataset:{tmp_path}/set", train="train[:15]")
    assert levels(train) == list(range(19, 4, -1))
    assert levels(val) == [4, 3, 2, 1, 0]


def test_hf_dataset_reads_parquet_files(tmp_path):
    for split, first in (("train", 0), ("validation", 50)):
        for shard in range(2):
            images = dataset(range(first + 4 * shard, first + 4 * shard + 4))
            (tmp_path / "set/data").mkdir(parents=True, exist_ok=True)
            images.to_parquet(tmp_path / f"set/data/{split}-0000{shard}-of-00002.parquet")
    train, val = open_source(f"hf_dataset:{tmp_path}/set")
    assert (levels(train), levels(val)) == (list(range(8)), list(range(50, 58)))
    assert train.classes == CLASSES


def test_hf_dataset_reads_image_files_by_path(tmp_path):
    for level in range(4):
        (tmp_path / f"{level}.png").write_bytes(png(level))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASSES))}
    )
    values = {"image": [str(tmp_path / f"{k}.png") for k in range(4)], "label": [0, 1, 0, 1]}
    images = datasets.Dataset.from_dict(values, features=features)
    images.save_to_disk(tmp_path / "set", max_shard_size="1GB")
    train, val = open_source(f"hf_dataset:{tmp_path}/set", train="train", val="train")
    assert levels(train) == levels(val) == [0, 1, 2, 3]


def test_hf_dataset_batches_are_the_same_in_worker_processes(saved):
    train, _ = open_source(f"hf_dataset:{saved}")
    config = BatchConfig(
        preprocessing=Preprocessing(image_size=8, resize_size=8),
        augment="crop_flip", batch_size=4, seed=1, stage=0,
    )  # fmt: skip
    (pooled,) = in_processes([train], 2)
    batches = [list(train_batches(each, config, epochs=2)) for each in (train, pooled)]
    pooled.workers.close()
    for ours, theirs in zip(*batches, strict=True):
        np.testing.assert_array_equal(ours.image, theirs.image)
        np.testing.assert_array_equal(ours.target, theirs.target)
    assert levels(pickle.loads(pickle.dumps(train.take(np.array([4, 2]))))) == [4, 2]


def test_hf_dataset_reports_unreadable_images(tmp_path):
    images = dataset(range(4)).to_dict()
    images["image"][1]["bytes"] = b"no image"
    images["image"][2] = None
    features = dataset([0]).features
    datasets.Dataset.from_dict(images, features=features).save_to_disk(tmp_path / "set")
    spec = f"hf_dataset:{tmp_path}/set"
    with pytest.raises(DataError, match="2 of 4 images cannot be read") as caught:
        open_source(spec, train="train[:3]", val="train[3:]")
    assert f"{spec} train[1]: not an image" in str(caught.value)
    assert f"{spec} train[2]: the record has no image" in str(caught.value)
    source = open_collection(spec).read(["train"])["train"]
    with pytest.raises(DataError, match=r"train\[2\] cannot be read: the record has no image"):
        source[2]


def test_hf_dataset_finds_columns_by_type(tmp_path):
    dataset(range(8), columns={"image": "photo", "label": "kind"}).save_to_disk(tmp_path / "set")
    assert len(open_source(f"hf_dataset:{tmp_path}/set").train) == 6
    dataset(range(8), label=datasets.Value("int64")).save_to_disk(tmp_path / "numbers")
    with pytest.raises(DataError, match="but has 1 and 0") as caught:
        open_source(f"hf_dataset:{tmp_path}/numbers")
    assert str(caught.value).endswith("\n  image: Image\n  label: Value\n  caption: Value")


def test_hf_dataset_prefers_columns_named_image_and_label(tmp_path):
    columns = {"image": "photo", "label": "kind", "caption": "note"}
    others = dataset(range(8), columns=columns, label=datasets.ClassLabel(names=["no", "yes"]))
    images = datasets.concatenate_datasets([others, dataset(range(8))], axis=1)
    images.save_to_disk(tmp_path / "set")
    assert open_source(f"hf_dataset:{tmp_path}/set").train.classes == CLASSES
    images.rename_column("label", "class").save_to_disk(tmp_path / "several")
    with pytest.raises(DataError, match="but has 1 and 2"):
        open_source(f"hf_dataset:{tmp_path}/several")


def test_hf_dataset_without_labels(tmp_path):
    images = dataset(range(4)).to_dict()
    images["label"] = [0, -1, None, 1]
    features = dataset([0]).features
    datasets.Dataset.from_dict(images, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(DataError, match="2 of 4 images have no label"):
        open_source(f"hf_dataset:{tmp_path}/set")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("", "hf_dataset: is no folder"),
        ("{root}/gone", "hf_dataset:{root}/gone is no folder (looked from"),
        ("{root}", "hf_dataset:{root} holds no dataset_dict.json, state.json or *.parquet"),
    ],
)
def test_hf_dataset_of_another_folder(place, message, tmp_path):
    with pytest.raises(DataError, match=re.escape(message.format(root=tmp_path))):
        open_source("hf_dataset:" + place.format(root=tmp_path))


@pytest.mark.parametrize("name", ["dataset_dict.json", "train/data-00000-of-00001.arrow"])
def test_hf_dataset_of_damaged_files(name, saved):
    (saved / name).write_bytes(b"damaged")
    with pytest.raises(DataError, match="cannot be read: "):
        open_source(f"hf_dataset:{saved}")


def test_hf_dataset_names_the_missing_package(saved, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = "needs the package datasets: pip install 'jaxft[hf-datasets]'"
    with pytest.raises(DataError, match=re.escape(message)):
        open_source(f"hf_dataset:{saved}")
