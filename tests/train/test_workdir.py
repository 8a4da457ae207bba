"""The workdir: one recipe, one run at a time, writable."""

import dataclasses
import errno
import shutil
import sys
from contextlib import closing, nullcontext, suppress

import jax.numpy as jnp
import pytest
from faults import replaced

from jaxft import Recipe, RecipeError, Stage, finetune
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.contents import Header
from jaxft.recipe_file import fields
from jaxft.train.workdir import check, check_apart, claim, saved

RECIPE = Recipe(model="resnet18", data="digits", stages=(Stage("head", {"fc": 1e-3}, epochs=1),))
RECIPE = RECIPE.expecting(RECIPE.preprocessing)


def begin(folder):
    """Writes a run with one checkpoint."""
    with claim(folder, RECIPE), closing(Checkpoints(folder / "checkpoints")) as checkpoints:
        header = Header({}, {}, {}, fields(RECIPE), ()).to_json()
        checkpoints.save(1, header, {"params": {"x": jnp.ones(1)}})


def test_workdir_belongs_to_run_from_its_first_checkpoint(tmp_path):
    with claim(tmp_path / "run", RECIPE):
        assert saved(tmp_path / "run") is None
    begin(tmp_path / "run")
    assert saved(tmp_path / "run") == RECIPE
    check(tmp_path / "run", dataclasses.replace(RECIPE, workers=7))
    with pytest.raises(RecipeError, match=r"another recipe:\n  seed: 0 -> 1"):
        check(tmp_path / "run", dataclasses.replace(RECIPE, seed=1))


@pytest.mark.parametrize("content", ["seed: 1", "stages: [", "\0" * 400, None])
def test_damaged_recipe_file_is_restored_from_checkpoint(content, tmp_path):
    begin(tmp_path)
    file = tmp_path / "recipe.yaml"
    whole = file.read_bytes()
    if content is None:
        file.unlink()
    else:
        file.write_text(content)
    assert saved(tmp_path) == RECIPE
    with pytest.raises(RecipeError, match=r"another recipe:\n  seed: 0 -> 1"):
        check(tmp_path, dataclasses.replace(RECIPE, seed=1))
    with claim(tmp_path, RECIPE):
        assert file.read_bytes() == whole


def test_workdir_with_checkpoint_being_replaced(tmp_path):
    begin(tmp_path)
    (tmp_path / "checkpoints" / "1").rename(tmp_path / "checkpoints" / "replaced-1")
    assert saved(tmp_path) == RECIPE


def test_workdir_of_running_process_is_refused(tmp_path):
    second = pytest.raises(RecipeError, match="another process is training in")
    with claim(tmp_path, RECIPE), second, claim(tmp_path, RECIPE):
        pass
    with suppress(KeyboardInterrupt), claim(tmp_path, RECIPE):
        raise KeyboardInterrupt
    with claim(tmp_path, RECIPE):
        pass


def test_workdir_is_claimed_by_first_process_only(tmp_path):
    with claim(tmp_path, RECIPE):
        with replaced("claim", lambda *_: ""), claim(tmp_path, RECIPE):
            pass
        refused = pytest.raises(RecipeError, match="not to be")
        with replaced("claim", lambda *_: "it is not to be"), refused, claim(tmp_path, RECIPE):
            pass


def test_workdir_on_full_disk_is_refused(disk):
    disk.fill(but=0)
    unwritable = pytest.raises(RecipeError, match="cannot be written: No space left on device")
    with unwritable, claim(disk.folder / "run", RECIPE):
        pass
    disk.free()
    begin(disk.folder / "run")


def test_workdir_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    nowhere = pytest.raises(RecipeError, match="/proc/nowhere cannot be written: No such file")
    with nowhere, claim("/proc/nowhere", RECIPE):
        pass
    monkeypatch.setattr("os.replace", denied)  # the tests may be root's, whom nothing is denied
    with pytest.raises(RecipeError, match="cannot be written: Permission"), claim(tmp_path, RECIPE):
        pass


@pytest.mark.parametrize("place", ["workdir", "fork_from", "weights"])
@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("gs://b/run", r"gs://b/run needs gcsfs, .*: pip install 'jaxft\[gcs\]'\."),
        ("s3://b/run", r"s3://b/run needs s3fs, .*: pip install 's3fs'\."),
    ],
)
def test_workdir_in_bucket_names_missing_extra(place, url, message, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "s3fs", None)
    places = {"workdir": tmp_path / "run", place: url}
    recipe = dataclasses.replace(RECIPE, weights=places.pop("weights", None))
    with pytest.raises(RecipeError, match=message):
        finetune(recipe, places.pop("workdir"), **places)


def test_workdir_of_unknown_protocol_is_refused():
    with pytest.raises(RecipeError, match="it is gs://"):
        finetune(RECIPE, "hdfs://b/run")


@pytest.mark.parametrize(
    ("classes", "place", "fits"),
    [
        ("data/train", "data/train/run", False),
        ("data/train", "data/train/ant/run", False),
        ("data/train", "link/train/run", False),
        ("data/train", "data/runs/1", True),
        ("data/train", "data", True),
        ("data", "data/run", False),
        ("data", "data/../run", True),
    ],
)
def test_workdir_among_class_folders_is_refused(classes, place, fits, tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / classes / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("data")
    expected = pytest.raises(RecipeError, match="each folder is a class of images; choose a")
    with nullcontext() if fits else expected:
        check_apart(tmp_path / place, f"folder:{tmp_path}/data")


def test_workdir_that_is_a_dead_link_is_refused(tmp_path):
    (tmp_path / "run").symlink_to(tmp_path / "gone")
    refused = pytest.raises(RecipeError, match="run is a link that leads nowhere; choose another")
    with refused, claim(tmp_path / "run", RECIPE):
        pass


def test_workdir_without_its_checkpoints_is_refused(tmp_path):
    begin(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    check(tmp_path, RECIPE)
    shutil.rmtree(tmp_path / "checkpoints")
    with pytest.raises(RecipeError, match="whose checkpoints are gone, and this run would replace"):
        check(tmp_path, RECIPE)
