"""Whole runs with each option of the data, with bad images, and from all kinds of sources."""

import concurrent.futures.thread
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from jaxft import DataError, Recipe, Stage, data, finetune
from jaxft.data import check_sample, prefetch
from jaxft.export import export
from jaxft.open_recipe import open_splits
from jaxft.report.console import Console

pytestmark = pytest.mark.usefixtures("stage_ends_only")

ROOT = Path(__file__).parents[2]
ONCE = (Stage("head", {"fc": 1e-2}, epochs=1, restore="last"),)
RECIPE = Recipe(
    model="cifar_resnet8",
    weights="asset:digits_0to4",
    data="digits:5-9",
    shots=6,
    batch_size=8,
    augment="shift",
    image_size=8,
    resize_size=8,
    stages=ONCE,
)
QUIET = Console(quiet=True)


def losses(workdir):
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(row)["train_loss"] for row in rows]


def image_folder(root, count=4):
    for split in ("train", "val"):
        for k, name in enumerate(("ants", "bees")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([k, i]).integers(0, 256, (12, 14, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.jpg")
    return root


def from_folder(root, **fields):
    return dataclasses.replace(RECIPE, data=f"folder:{root}", shots=None, **fields)


@pytest.fixture(scope="module")
def plain(stage_ends_only, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain")
    return workdir, finetune(RECIPE, workdir, console=QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, {"augment": "none", "steps_per_execution": 2}], ids=str)
def test_normalized_float_images_train_as_bytes(fields, tmp_path):
    recipe = dataclasses.replace(RECIPE, augment="flip", cutmix=1.0, tta="flip", shots=None)
    recipe = dataclasses.replace(recipe, **fields)
    levels = [source.take(np.arange(20)) for source in data.open_source("digits:5-9", shots=6)]
    preprocessing = data.Preprocessing(image_size=8, resize_size=8, mean=(0.5,) * 3, std=(0.2,) * 3)
    floats = [
        data.arrays(
            preprocessing.normalize(source.images), source.targets, source.classes,
            values="normalized",
        )
        for source in levels
    ]  # fmt: skip
    scores = []
    for name, sources in (("levels", levels), ("floats", floats)):
        given = dataclasses.replace(recipe, mean=preprocessing.mean, std=preprocessing.std)
        result = finetune(given, tmp_path / name, data=data.Splits(*sources), console=QUIET)
        scores.append([*result.score.values.values()])
    np.testing.assert_allclose(*scores, rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "levels"), losses(tmp_path / "floats"), rtol=1e-5)
    described = json.loads((tmp_path / "floats/model.json").read_text())
    assert described["pixels"] == "float32"
    if fields:
        return
    _, score = export(tmp_path / "floats", tmp_path / "out", platforms=("cpu",))
    program = jax.export.deserialize((tmp_path / "out/model.jaxexport").read_bytes())
    correct = np.argmax(program.call(floats[1].images), 1) == floats[1].targets
    assert abs(correct.mean() - score.accuracy) < 0.1  # which is of two views
    (late,) = (dataclasses.replace(stage, augment="jitter") for stage in recipe.stages)
    with pytest.raises(DataError, match="stage 'head': augment=jitter changes colours"):
        finetune(
            dataclasses.replace(recipe, stages=(late,)), tmp_path / "no", data=floats[0],
            console=QUIET,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"augment": "randaugment"},
        {"random_erasing": 0.5},
        {"cutmix": 1.0, "mixup": 0.5, "label_smoothing": 0.1},
        {"balance": "loss", "shots": None, "train_split": "train[:37]"},
        {"balance": "sampling"},
        {"drop_last": True},
        {"train_split": "train[4/class]", "shots": None},
        {"resize_mode": "squash", "resize_size": 10},
    ],
    ids=str,
)
def test_data_options_change_training_reproducibly(fields, plain, tmp_path):
    recipe = dataclasses.replace(RECIPE, **fields)
    finetune(recipe, tmp_path / "run", console=QUIET)
    found = losses(tmp_path / "run")
    assert np.isfinite(found).all()
    assert found != losses(plain[0])
    if not fields.keys() & {"augment", "balance", "train_split", "resize_mode"}:
        return
    other_threads = dataclasses.replace(recipe, workers=0, cache_mib=0)
    finetune(other_threads, tmp_path / "again", console=QUIET)
    assert losses(tmp_path / "again") == found


@pytest.mark.slow
def test_tta_changes_score_but_not_weights(plain, tmp_path):
    _, result = plain
    both = finetune(dataclasses.replace(RECIPE, tta="flip"), tmp_path / "run", console=QUIET)
    assert both.weights.read_bytes() == result.weights.read_bytes()
    assert both.score != result.score


@pytest.mark.slow
def test_image_cache_changes_nothing(tmp_path):
    recipe = from_folder(image_folder(tmp_path / "images"), augment="crop_flip")
    kept = finetune(recipe, tmp_path / "a", console=QUIET)
    bare = finetune(dataclasses.replace(recipe, cache_mib=0), tmp_path / "b", console=QUIET)
    assert kept.weights.read_bytes() == bare.weights.read_bytes()
    assert kept.score == bare.score


@pytest.mark.slow
def test_worker_processes_change_nothing(tmp_path):
    recipe = from_folder(image_folder(tmp_path / "images"), augment="crop_flip")
    threads = finetune(recipe, tmp_path / "a", console=QUIET)
    recipe = dataclasses.replace(recipe, worker_processes=2)
    processes = finetune(recipe, tmp_path / "b", console=QUIET)
    assert processes.weights.read_bytes() == threads.weights.read_bytes()
    assert processes.score == threads.score


def test_drop_last_remarks_on_dropped_images():
    recipe = dataclasses.replace(RECIPE, drop_last=True, batch_size=7)
    assert open_splits(recipe, None).remarks[1:] == (
        "drop_last leaves out 2 of 30 images in each epoch, other ones each time: they do not fill "
        "a batch of 7.",
    )
    assert len(open_splits(dataclasses.replace(recipe, batch_size=6), None).remarks) == 1


def test_drop_last_must_not_drop_all_images(tmp_path):
    recipe = dataclasses.replace(RECIPE, drop_last=True, batch_size=64)
    with pytest.raises(DataError, match="drop_last leaves nothing of 30 images in batches of 64"):
        finetune(recipe, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def truncated(images):
    path = images / "train/bees/2.jpg"
    path.write_bytes(path.read_bytes()[:300])
    return "train/bees/2.jpg: "


def text(images):
    (images / "val/ants/1.jpg").write_text("no image")
    return "val/ants/1.jpg: not an image"


def empty(images):
    (images / "train/ants/0.jpg").write_bytes(b"")
    return "train/ants/0.jpg: "


def bomb(images):
    Image.new("L", (20000, 20000)).save(images / "train/ants/3.png")
    return "train/ants/3.png: the image exceeds the size that is safe to decode"


BAD = [truncated, text, empty, bomb]


@pytest.mark.slow
@pytest.mark.parametrize("damage", BAD, ids=lambda damage: damage.__name__)
def test_bad_image_is_refused_before_training(damage, tmp_path):
    recipe = from_folder(image_folder(tmp_path / "images"))
    expected = damage(tmp_path / "images")
    with pytest.raises(DataError, match="on_bad_image='skip'") as caught:
        finetune(recipe, tmp_path / "run", console=QUIET)
    assert expected in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_bad_images_are_skipped_and_listed(tmp_path, capsys):
    recipe = from_folder(image_folder(tmp_path / "images"), on_bad_image="skip")
    expected = [damage(tmp_path / "images") for damage in BAD]
    finetune(recipe, tmp_path / "run")
    lines = capsys.readouterr().out.splitlines()
    start = lines.index("Left out 4 of 17 images, which cannot be read:")
    listed = sorted(lines[start + 1 : start + 5])
    assert all(any(part in line for line in listed) for part in expected), listed
    assert lines.count(lines[start]) == 1
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("steps_per_execution", "step"), [(1, 5), (2, 4)])
def test_unchecked_bad_image_ends_the_run_which_resumes_once_it_is_restored(
    steps_per_execution, step, tmp_path, monkeypatch
):
    monkeypatch.setattr(check_sample, "SAMPLE_SIZE", 2)  # the first and the last of each split
    root = image_folder(tmp_path / "images", count=6)
    recipe = from_folder(
        root, batch_size=2, cache_mib=0, workers=0, steps_per_execution=steps_per_execution
    )
    whole = finetune(recipe, tmp_path / "whole", console=QUIET)

    file = root / "train/bees/2.jpg"
    content = file.read_bytes()
    file.write_bytes(content[:300].ljust(len(content)))  # the run compares sizes on resume
    with pytest.raises(DataError, match=rf"bees/2\.jpg cannot be read(.|\n)*Step {step} is saved"):
        finetune(recipe, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run" / "model.safetensors").exists()
    file.write_bytes(content)
    resumed = finetune(recipe, tmp_path / "run", console=QUIET)
    assert resumed.weights.read_bytes() == whole.weights.read_bytes()
    assert resumed.score == whole.score

    file.write_bytes(content[:300])
    with pytest.raises(DataError, match="1 of 24 images cannot be read"):
        finetune(dataclasses.replace(recipe, check="all"), tmp_path / "other", console=QUIET)


def no_images(images):
    for path in (images / "val/bees").iterdir():
        path.unlink()


def other_classes(images):
    (images / "val/bees").rename(images / "val/wasps")


@pytest.mark.parametrize(
    ("damage", "message"),
    [(no_images, "no images in .*val/bees"), (other_classes, "Only in train: bees.*in val: wasps")],
    ids=["no images", "other classes"],
)
def test_folders_with_other_classes_are_refused(damage, message, tmp_path):
    recipe = from_folder(image_folder(tmp_path / "images"), on_bad_image="skip")
    damage(tmp_path / "images")
    with pytest.raises(DataError, match=message):
        finetune(recipe, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


def in_memory(count=30):
    images = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)
    return data.arrays(images, np.arange(count) % 3, ["a", "b", "c"])


@pytest.mark.slow
def test_run_with_images_in_memory(tmp_path, capsys):
    recipe = dataclasses.replace(RECIPE, data="noise", shots=None)
    result = finetune(recipe, tmp_path / "run", data=in_memory())
    said = capsys.readouterr().out
    assert "noise: 24 images to train on, 6 to validate, 3 classes" in said
    again = finetune(recipe, tmp_path / "run", data=in_memory(), console=QUIET)
    assert again == result
    with pytest.raises(DataError, match="unknown data 'noise'"):
        finetune(recipe, tmp_path / "run", console=QUIET)


def test_targets_outside_of_classes_are_refused(tmp_path):
    source = in_memory()
    source.targets[3] = 3
    with pytest.raises(
        DataError, match="targets of train go from 0 to 3, outside of the 3 classes"
    ):
        finetune(dataclasses.replace(RECIPE, shots=None), tmp_path / "run", data=source)
    assert not (tmp_path / "run").exists()


def test_dead_data_thread_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(concurrent.futures.thread._WorkItem, "run", lambda self: sys.exit())
    with pytest.raises(DataError, match="a thread that prepares batches has died"):
        finetune(RECIPE, tmp_path / "run", console=QUIET)


@pytest.mark.slow
def test_prepared_tfds_folder_trains_as_image_folder(tmp_path):
    """Its images are in another order; one batch holds all of them."""
    images = image_folder(tmp_path / "images")
    script = [sys.executable, ROOT / "scripts/prepare_tfds.py", images, tmp_path / "set"]
    subprocess.run(script, check=True, capture_output=True)
    runs = []
    for kind, place in (("folder", images), ("tfds_dir", tmp_path / "set")):
        recipe = dataclasses.replace(RECIPE, data=f"{kind}:{place}", shots=None, batch_size=64)
        finetune(dataclasses.replace(recipe, augment="none"), tmp_path / kind, console=QUIET)
        runs.append(load_file(tmp_path / kind / "model.safetensors"))
    for name, array in runs[0].items():
        np.testing.assert_allclose(runs[1][name], array, rtol=1e-3, atol=1e-5, err_msg=name)
