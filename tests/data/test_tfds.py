"""TFDS data sets without TensorFlow: preparing, reading, slicing, and error messages."""

import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jaxft.data import open_source, split_expressions
from jaxft.data import tfds as tfds_source
from jaxft.data.concat import ConcatSource
from jaxft.data.open_source import open_collection
from jaxft.errors import DataError

SCRIPT = Path(__file__).parents[2] / "scripts/prepare_tfds.py"


def image_folder(root):
    """Saves 12 training images of `ant` and 9 of `bee`, and 4 and 3 test images; JPEG and PNG."""
    for folder, count in {"train/ant": 12, "train/bee": 9, "test/ant": 4, "test/bee": 3}.items():
        (root / folder).mkdir(parents=True)
        for k in range(count):
            pixels = np.random.default_rng([k, *folder.encode()]).integers(0, 256, (10, 12, 3))
            suffix = "png" if k % 3 else "jpg"
            Image.fromarray(pixels.astype(np.uint8)).save(root / folder / f"{k}.{suffix}")
    return root


def prepare(*arguments):
    """Runs scripts/prepare_tfds.py."""
    command = [sys.executable, SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def pixels_and_targets(source):
    return sorted((source[k][0].tobytes(), source[k][1]) for k in range(len(source)))


@pytest.fixture(scope="module")
def tfds():
    """TFDS, whose import takes seconds, with the data set sklearn_digits registered."""
    import digits_builder  # noqa: F401
    import tensorflow_datasets

    return tensorflow_datasets


@pytest.fixture(scope="module", autouse=True)
def _data_dir(tfds, tmp_path_factory):
    tfds.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def prepared(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "prepared"
    process = prepare(folder, out, "--name", "ants_and_bees")
    assert process.returncode == 0, process.stderr
    assert f"Wrote {out} (test 7, train 21 images): --data tfds_dir:{out}" in process.stdout
    return out


# Reading.


@pytest.mark.parametrize("shots", [None, 5])
def test_tfds_digits_equal_the_digits_source(shots, monkeypatch):
    monkeypatch.setattr(tfds_source, "_is_offline", lambda: False)  # needs no download
    actual = open_source("tfds:sklearn_digits", shots=shots, seed=3)
    expected = open_source("digits", shots=shots, seed=3)
    for source, other in zip(actual, expected, strict=True):
        assert source.classes == other.classes
        assert source.targets.dtype == np.int32
        np.testing.assert_array_equal(source.targets, other.targets)
        assert all(source[k] == other[k] for k in range(0, len(source), 7))
    assert "tfds:sklearn_digits has no validation split" in actual.remarks[0]
    assert "tensorflow" not in sys.modules


@pytest.mark.slow
def test_prepare_tfds_keeps_files_classes_and_splits(tfds, folder, prepared):
    builder = tfds.builder_from_directory(prepared)
    assert (builder.info.name, set(builder.info.splits)) == ("ants_and_bees", {"train", "test"})
    skip = {"image": tfds.decode.SkipDecoding()}
    for split in ("train", "test"):
        stored = {
            example["file_name"].decode(): example["image"]
            for example in builder.as_data_source(split=split, decoders=skip)
        }
        files = (folder / split).glob("*/*")
        assert stored == {f"{path.parent.name}/{path.name}": path.read_bytes() for path in files}
    actual = open_source(f"tfds_dir:{prepared}", val="test")
    expected = open_source(f"folder:{folder}", val="test")
    for source, other in zip(actual, expected, strict=True):
        assert source.classes == ("ant", "bee")
        assert pixels_and_targets(source) == pixels_and_targets(other)
    targets = actual.train.targets.tolist()
    assert targets != sorted(targets)  # shuffled, so that slices mix the classes


def test_prepare_tfds_keeps_nested_images(folder, tmp_path):
    from jaxft.cli import folder_builder

    images = shutil.copytree(folder / "train", tmp_path / "images")
    (images / "ant/more").mkdir()
    shutil.copy(images / "ant/1.png", images / "ant/more/1.png")  # the same file name
    collection = open_collection(f"folder:{images}")
    folder_builder.write(collection.read(("train",)), tmp_path / "out", "nested")
    source = open_collection(f"tfds_dir:{tmp_path}/out").read(("train",))["train"]
    assert len(source) == 22


@pytest.mark.slow
def test_prepare_tfds_of_a_folder_of_classes(folder, tmp_path):
    classes = shutil.copytree(folder / "train", tmp_path / "classes")
    (classes / "ant/x.png").write_bytes(b"not a picture")
    bad_image = prepare(classes, tmp_path / "out")
    assert bad_image.returncode == 1
    assert bad_image.stderr.startswith("DataError: 1 of 22 images cannot be read")
    assert not (tmp_path / "out").exists()
    success = prepare(classes, tmp_path / "out", "--on-bad-image", "skip")
    assert "Left out 1 of 22 images" in success.stdout
    assert sum(map(len, open_source(f"tfds_dir:{tmp_path}/out"))) == 21
    existing = prepare(classes, tmp_path / "out", "--on-bad-image", "skip")
    assert f"{tmp_path}/out exists already" in existing.stderr
    bad_name = prepare(folder, tmp_path / "other", "--name", "A B")
    assert "'A B' cannot name a TFDS data set" in bad_name.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["classes", "out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "val", "counts"),
    [
        ("train[:80%]", "train[80%:]", (17, 4)),
        ("train[5:]", "test", (16, 7)),
        ("train[3/class]", "test", (6, 7)),
        ("train+test[2/class]", None, (25, 3)),
        ("train", None, (17, 4)),
    ],
)
def test_tfds_split_expressions(prepared, train, val, counts):
    splits = open_source(f"tfds_dir:{prepared}", train=train, val=val)
    assert tuple(map(len, splits)) == counts
    for source in splits:
        assert [source[k][1] for k in range(len(source))] == source.targets.tolist()
    assert isinstance(splits.train, ConcatSource) == ("+" in train)


@pytest.mark.slow
def test_tfds_source_in_other_threads_and_processes(prepared):
    source = open_source(f"tfds_dir:{prepared}", val="test").train
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda k: source[k % len(source)], range(200)))
    assert images == [source[k % len(source)] for k in range(200)]
    code = (
        "import pickle, sys; source = pickle.load(sys.stdin.buffer);"
        "sys.stdout.buffer.write(pickle.dumps([source[k] for k in range(len(source))]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(source), capture_output=True, check=True
    )
    assert pickle.loads(process.stdout) == images[: len(source)]


# Split expressions.


@given(
    st.integers(1, 400),
    st.sampled_from(["%", ".5%", ""]),
    st.none() | st.integers(-110, 410),
    st.none() | st.integers(-110, 410),
)
def test_split_expressions_equal_tfds(tfds, count, unit, start, stop):
    first, last = ("" if bound is None else f"{bound}{unit}" for bound in (start, stop))
    expression = f"train[{first}:{last}]"
    try:
        instruction = tfds.core.ReadInstruction.from_spec(expression)
        (absolute,) = instruction.to_absolute({"train": SimpleNamespace(num_examples=count)})
    except (ValueError, AssertionError):
        expected = None
    else:
        expected = range(absolute.from_ or 0, count if absolute.to is None else absolute.to)
    try:
        (term,) = split_expressions.parse(expression)
        actual = range(*term.range(count))
    except (DataError, IndexError):
        actual = None
    assert actual == expected


# Errors.


@pytest.fixture
def changed(prepared, tmp_path):
    """A function that changes a JSON file in a copy of the prepared folder; returns the spec."""

    def change(file, change_content):
        copy = shutil.copytree(prepared, tmp_path / "changed")
        content = json.loads((copy / file).read_text())
        change_content(content)
        (copy / file).write_text(json.dumps(content))
        return f"tfds_dir:{copy}"

    return change


def error_message(spec, **options):
    with pytest.raises(DataError) as caught:
        open_source(spec, **options)
    return str(caught.value)


@pytest.mark.parametrize(
    ("spec", "fragments"),
    [
        ("tfds:", ["names no set", "tfds:NAME"]),
        ("tfds:oxford_flower102", ["no such data set", "Did you mean oxford_flowers102"]),
        ("tfds:cifar10/nothing:9.9.9", ["tfds:cifar10/nothing:9.9.9", "nothing not found"]),
        ("tfds:cifar10", ["not prepared", "download_and_prepare()", "machine is offline"]),
        ("tfds:penguins", ["needs one Image and one ClassLabel", "0 and 1", "species: ClassLabel"]),
        ("tfds_dir:", ["holds no dataset_info.json"]),
        ("tfds_dir:{parent}", ["holds no dataset_info.json", "Did you mean {prepared}?"]),
        ("tfds_dir:{prepared}/nothing", ["holds no dataset_info.json"]),
    ],
)
def test_tfds_spec_error(spec, fragments, prepared, monkeypatch):
    monkeypatch.setattr(tfds_source, "_is_offline", lambda: True)
    paths = {"prepared": prepared, "parent": prepared.parent}
    message = error_message(spec.format(**paths))
    for fragment in fragments:
        assert fragment.format(**paths) in message


def test_tfds_download_error(tfds, monkeypatch):
    def fail(self):
        raise ConnectionError("host unreachable")

    monkeypatch.setattr(tfds_source, "_is_offline", lambda: False)
    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", fail)
    message = error_message("tfds:cifar10")
    assert "Preparing it failed. ConnectionError: host unreachable" in message
    assert "tfds.builder('cifar10', file_format='array_record').download_and_prepare()" in message


@pytest.mark.parametrize("proxies", [{}, {"https": "proxy"}])
def test_tfds_is_offline_without_name_resolution_and_proxy(proxies, monkeypatch):
    def fail(*_):
        raise OSError

    monkeypatch.setattr("socket.getaddrinfo", fail)
    monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
    assert tfds_source._is_offline() == (not proxies)


def test_tfds_other_file_format_error(changed):
    spec = changed("dataset_info.json", lambda info: info.update(fileFormat="tfrecord"))
    message = error_message(spec)
    assert "prepared as tfrecord" in message
    assert "--out_file_format=array_record" in message


def test_tfds_split_and_shots_error(prepared):
    spec = f"tfds_dir:{prepared}"
    assert "no split dev" in error_message(spec, val="dev")
    assert "Its splits: test, train" in error_message(spec, val="dev")
    assert "at most 9. Images per class: bee 9" in error_message(spec, val="test", shots=10)
    assert "at most 8 (1 must remain" in error_message(spec, shots=9)


def test_tfds_without_label_error(changed):
    def drop_label(features):
        del features["featuresDict"]["features"]["label"]

    message = error_message(changed("features.json", drop_label))
    assert "has 1 and 0" in message
    assert "file_name: Text" in message


def test_tfds_unlabelled_images_error(changed):
    def fewer_classes(features):
        label = features["featuresDict"]["features"]["label"]["classLabel"]
        label["numClasses"] = "1"

    spec = changed("features.json", fewer_classes)
    (Path(spec.removeprefix("tfds_dir:")) / "label.labels.txt").write_text("ant\n")
    assert "9 of 21 images have no label" in error_message(spec)


def test_tfds_unreadable_images(folder, tmp_path):
    from jaxft.cli import folder_builder

    bad = shutil.copytree(folder, tmp_path / "bad")
    (bad / "train/bee/1.png").write_bytes(b"not a picture")
    collection = open_collection(f"folder:{bad}")
    folder_builder.write(collection.read(("train", "test")), tmp_path / "out", "bad")
    spec = f"tfds_dir:{tmp_path}/out"
    message = error_message(spec, val="test")
    assert "1 of 28 images cannot be read" in message
    assert f"{spec} train[" in message
    assert "not an image" in message
    splits = open_source(spec, val="test", on_bad_image="skip")
    assert tuple(map(len, splits)) == (20, 7)
    assert splits.remarks[0].startswith("Left out 1 of 28 images")


def test_tfds_damaged_file_error(prepared, tmp_path):
    copy = shutil.copytree(prepared, tmp_path / "damaged")
    (shard,) = copy.glob("*-train.array_record*")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 64] = bytes(64)
    shard.write_bytes(content)
    assert "Its file is damaged" in error_message(f"tfds_dir:{copy}", val="test")
    shard.unlink()
    assert "cannot be" in error_message(f"tfds_dir:{copy}", val="test")
