"""Whole runs on the digits: their files, their results, and resumption."""

import dataclasses
import json
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from mortal import QUIET, killed, rows, train_to_end

from jaxft import (
    Adam,
    CheckpointError,
    DataError,
    EarlyStop,
    JaxftError,
    PatternError,
    Recipe,
    RecipeError,
    ReduceLROnPlateau,
    Stage,
    WeightsError,
    data,
    finetune,
    models,
    weights,
)
from jaxft.data import Preprocessing
from jaxft.open_recipe import draw_start
from jaxft.optim.schedules import CosineAnnealingLR
from jaxft.recipe_file import read
from jaxft.train.eval_step import eval_step
from jaxft.train.metrics import Metrics
from jaxft.train.workdir import claim
from jaxft.weights.head import new_head

pytestmark = pytest.mark.usefixtures("shared_programs")

ROOT = Path(__file__).parents[2]
RECIPE = Recipe(
    model="cifar_resnet8",
    weights="asset:digits_0to4",
    data="digits:5-9",
    shots=6,
    optimizer=Adam(),
    batch_size=8,
    augment="shift",
    image_size=8,
    resize_size=8,
    dropout=0.1,
    stages=(
        Stage("head", {"fc": 1e-2}, epochs=2),
        Stage("late", {"fc": 1e-3, "layer3": 1e-3}, epochs=3, carry="keep"),
        Stage("all", {"*": 1e-3}, epochs=2, restore="last"),
    ),
)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    return workdir, train_to_end(workdir, RECIPE)


@pytest.mark.slow
@pytest.mark.smoke
def test_run_files_and_epochs(unbroken):
    workdir, result = unbroken
    assert {path.name for path in workdir.iterdir()} == {
        "recipe.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "lock",
        "model.safetensors", "model.json", "environment.json",
    }  # fmt: skip
    assert read(workdir / "recipe.yaml") == RECIPE.expecting(Preprocessing())
    assert [(row["stage"], row["epoch"], row["step"]) for row in rows(workdir)] == [
        ("head", 1, 4), ("head", 2, 8),
        ("late", 1, 12), ("late", 2, 16), ("late", 3, 20),
        ("all", 1, 24), ("all", 2, 28),
    ]  # fmt: skip
    assert rows(workdir)[2]["lr"] == pytest.approx({"fc": 1e-3, "layer3": 1e-3})
    assert result.checkpoint == workdir / "checkpoints" / "28"
    assert result.checkpoint.is_dir()
    assert any((workdir / "tensorboard").iterdir())


@pytest.mark.slow
@pytest.mark.smoke
def test_exported_model_reproduces_validation_score(unbroken):
    workdir, result = unbroken
    described = json.loads((workdir / "model.json").read_text())
    assert described["classes"] == ["5", "6", "7", "8", "9"]
    assert described["preprocessing"]["image_size"] == 8
    assert described["score"] == result.score.values
    model = models.create("cifar_resnet8", num_classes=5)
    params, stats = weights.load(result.weights, model)
    source = data.open_source("digits:5-9", shots=6, seed=0).val
    batches = data.eval_batches(source, RECIPE.preprocessing, batch_size=64, workers=1)
    evaluate = eval_step(model, RECIPE.preprocessing)
    again = Metrics.total([evaluate(params, stats, batch) for batch in batches]).score
    assert again.accuracy == result.score.accuracy
    assert again.loss == pytest.approx(result.score.loss, rel=1e-5)


def test_finished_run_is_not_run_again(unbroken):
    workdir, result = unbroken
    before = (workdir / "metrics.jsonl").read_text()
    assert finetune(RECIPE, workdir, console=QUIET) == result
    assert (workdir / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_preprocessing_of_weights_is_that_of_the_run(tmp_path):
    """Recipe, exported model and a second run agree, also without resizing."""
    file = tmp_path / "own.safetensors"
    file.write_bytes((ROOT / "jaxft/assets/digits_0to4.safetensors").read_bytes())
    own = {"image_size": 8, "resize_size": None, "mean": [0.3] * 3, "std": [0.4] * 3}
    file.with_suffix(".json").write_text(json.dumps({"preprocessing": own}))
    once = Stage("once", {"fc": 1e-3}, epochs=1)
    recipe = dataclasses.replace(
        RECIPE, weights=str(file), image_size=None, resize_size=None, stages=(once,)
    )
    workdir = tmp_path / "run"
    result = finetune(recipe, workdir, console=QUIET)
    described = json.loads((workdir / "model.json").read_text())["preprocessing"]
    assert described == dataclasses.asdict(read(workdir / "recipe.yaml").preprocessing) | {
        "mean": own["mean"], "std": own["std"],
    }  # fmt: skip
    assert (described["image_size"], described["resize_size"]) == (8, 8)
    file.with_suffix(".json").unlink()
    assert finetune(recipe, workdir, console=QUIET) == result


def test_recipe_errors_precede_download_of_weights(tmp_path):
    recipe = dataclasses.replace(RECIPE, weights="gone.safetensors")
    (tmp_path / "file").touch()
    for fields, workdir, message in (
        ({"model": "resnet5"}, "run", "resnet5"),
        ({"dropout": 2.0}, "run", "dropout"),
        ({"data": "folder:nowhere"}, "run", "nowhere"),
        ({}, "file", "is a file"),
        ({}, "run", "there are no weights"),
    ):
        with pytest.raises(JaxftError, match=message):
            finetune(dataclasses.replace(recipe, **fields), tmp_path / workdir, console=QUIET)


def test_data_of_one_class_is_refused(tmp_path):
    recipe = dataclasses.replace(RECIPE, weights=None, data="digits:3", shots=None)
    with pytest.raises(DataError, match="digits:3: all images to train on are of one class, '3'"):
        finetune(recipe, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()
    two = data.arrays(np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, int), ["a", "b"])
    with pytest.raises(DataError, match="are of one class, 'a'"):
        finetune(recipe, tmp_path / "run", data=data.Splits(two, two), console=QUIET)


@pytest.mark.parametrize("start", ["zeros", "xavier"])
def test_head_initialisation_without_weights(start, tmp_path):
    recipe = dataclasses.replace(RECIPE, weights=None, head=start)
    model = recipe.network(5)
    params, _ = draw_start(recipe, model, None)
    expected = new_head(model, start, jax.random.key(recipe.seed))
    jax.tree.map(np.testing.assert_array_equal, params["fc"], expected)


@pytest.mark.slow
def test_resume_needs_no_weights_file(unbroken, tmp_path):
    weights_file = tmp_path / "digits.safetensors"
    weights_file.write_bytes((ROOT / "jaxft/assets/digits_0to4.safetensors").read_bytes())
    recipe = dataclasses.replace(RECIPE, weights=str(weights_file), stages=RECIPE.stages[:1])
    with killed("step", 5):
        finetune(recipe, tmp_path / "run", console=QUIET)
    weights_file.unlink()
    finetune(recipe, tmp_path / "run", console=QUIET)
    losses, expected = (
        [row["val_loss"] for row in rows(workdir)][:2]
        for workdir in (tmp_path / "run", unbroken[0])
    )
    assert losses == pytest.approx(expected, rel=1e-5)
    with pytest.raises(WeightsError, match="there are no weights"):
        finetune(recipe, tmp_path / "other", console=QUIET)


@pytest.mark.slow
def test_resume_restores_schedules_and_parked_state(tmp_path):
    """A group that skips a stage, a schedule by step, and one that validation drives."""
    both = {"fc": 1e-2, "layer3": 1e-2}
    plateau = ReduceLROnPlateau(patience=0, threshold=1e3, factor=0.5)
    recipe = dataclasses.replace(
        RECIPE,
        stages=(
            Stage("both", both, 1, carry="keep"),
            Stage("out", {"fc": 1e-2}, 2, schedule=CosineAnnealingLR(by="step"), carry="keep"),
            Stage("back", both, 2, schedule=plateau, carry="keep"),
        ),
    )
    whole = train_to_end(tmp_path / "whole", recipe)
    found = [row["lr"]["fc"] for row in rows(tmp_path / "whole")]
    assert found == pytest.approx([1e-2, 1e-2, 0.5e-2, 1e-2, 0.5e-2])
    for step in (9, 17):
        with killed("step", step):
            finetune(recipe, tmp_path / "run", console=QUIET)
    again = train_to_end(tmp_path / "run", recipe)
    assert again.weights.read_bytes() == whole.weights.read_bytes()
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")


GIVEN = dataclasses.replace(RECIPE, shots=None)  # images given by `data=`


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """Folder and images of a run that died after its first epoch."""
    workdir, images = tmp_path_factory.mktemp("begun"), data.open_source("digits:5-9", shots=6)
    with killed("step", 5):
        finetune(GIVEN, workdir, data=images, console=QUIET)
    return workdir, images


@pytest.mark.slow
def test_resume_refuses_fewer_images(begun):
    workdir, (train, val) = begun
    fewer = data.Splits(train.take(np.arange(len(train) - 1)), val)
    with pytest.raises(
        CheckpointError, match=r"images have changed(?s:.*)train: 30 images then, 29"
    ):
        finetune(GIVEN, workdir, data=fewer, console=QUIET)


@pytest.mark.slow
def test_resume_refuses_images_of_exchanged_classes(begun):
    workdir, (train, val) = begun
    first, other = 0, int(np.flatnonzero(train.targets != train.targets[0])[0])
    targets = train.targets.copy()
    targets[[first, other]] = targets[[other, first]]
    exchanged = data.Splits(dataclasses.replace(train, targets=targets), val)
    with pytest.raises(CheckpointError, match="train: as many images of each class, but some are"):
        finetune(GIVEN, workdir, data=exchanged, console=QUIET)


@pytest.mark.slow
def test_stage_that_never_improves_restores_its_start(tmp_path):
    stages = (
        Stage("head", {"fc": 1e-2}, epochs=1),
        Stage("ruin", {"*": 0.3}, epochs=5, until=EarlyStop(patience=2, baseline="start")),
    )
    recipe, head_alone = (dataclasses.replace(RECIPE, stages=stages[:n]) for n in (2, 1))
    broken, head = train_to_end(tmp_path / "a", recipe), train_to_end(tmp_path / "b", head_alone)
    assert [row["stage"] for row in rows(tmp_path / "a")] == ["head", "ruin", "ruin"]
    assert broken.score == head.score
    assert broken.weights.read_bytes() == head.weights.read_bytes()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 4}, "another recipe:\n  batch_size: 8 -> 4\n"),
        ({"stages": RECIPE.stages[:2]}, r"another recipe:\n  stages\[all\]: a stage -> absent\n"),
    ],
    ids=str,
)
def test_workdir_of_another_recipe_is_refused(fields, message, unbroken):
    workdir, _ = unbroken
    before = sorted(workdir.rglob("*"))
    with pytest.raises(RecipeError, match=message):
        finetune(dataclasses.replace(RECIPE, **fields), workdir, console=QUIET)
    assert sorted(workdir.rglob("*")) == before


def test_workdir_in_use_is_refused(tmp_path):
    errors = []

    def second():
        try:
            finetune(RECIPE, tmp_path / "run", console=QUIET)
        except RecipeError as error:
            errors.append(str(error))

    with claim(tmp_path / "run", RECIPE):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert errors == [f"another process is training in {tmp_path / 'run'}."]


class Unreadable:
    """Images of two classes that can no longer be read."""

    classes = ("a", "b")
    targets = np.arange(20, dtype=np.int32) % 2

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, _):
        raise DataError("an image can no longer be read")


@pytest.mark.slow
def test_workdir_without_checkpoint_takes_another_recipe(tmp_path):
    """A run that failed at its first image does not block the corrected recipe."""
    once = dataclasses.replace(RECIPE, stages=(Stage("once", {"fc": 1e-3}, epochs=1),))
    other = dataclasses.replace(once, image_size=16, resize_size=16)
    with pytest.raises(DataError, match="no longer"):
        finetune(other, tmp_path / "run", data=Unreadable(), console=QUIET)
    finetune(once, tmp_path / "run", console=QUIET)
    assert read(tmp_path / "run" / "recipe.yaml") == once.expecting(Preprocessing())


def test_patterns_of_later_stages_are_checked_before_training(tmp_path):
    wrong = dataclasses.replace(RECIPE, stages=(*RECIPE.stages, Stage("x", {"layer9": 1.0}, 1)))
    with pytest.raises(PatternError, match="layer9"):
        finetune(wrong, tmp_path / "run", console=QUIET)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["file", "foreign", "unwritable"])
def test_unusable_workdir_is_refused(kind, tmp_path):
    workdir = tmp_path / "run"
    if kind == "file":
        workdir.write_text("")
        message = "is a file"
    elif kind == "foreign":
        workdir.mkdir()
        (workdir / "thesis.tex").write_text("")
        message = "is not empty and holds no run"
    else:
        workdir = Path("/proc/nowhere")
        message = "cannot be written"
    with pytest.raises(RecipeError, match=message):
        finetune(RECIPE, workdir, console=QUIET)


def test_prefetch_threads_end_with_the_run(unbroken):
    readers = [t for t in threading.enumerate() if t.name.startswith("jaxft-data")]
    for reader in readers:
        reader.join(10)  # a thread finishes its current batch
    assert not [reader for reader in readers if reader.is_alive()]
