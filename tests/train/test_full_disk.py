"""A full disk in each phase of a run that writes: one error, and the same command resumes."""

import numpy as np
import pytest
from faults import before
from flax import linen as nn
from mortal import QUIET, rows

from jaxft import L2SP, Adam, JaxftError, Recipe, Stage, data, finetune, models

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
IMAGES = data.arrays(PIXELS, np.arange(12) % 2, classes=["a", "b"])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(x.mean((1, 2)))


NETWORK = models.Linen(Net(), shape=(8, 8, 3), head="head")
RECIPE = Recipe(
    model="net",
    data="noise",
    optimizer=Adam(),
    train_split="train[:8]",
    val_split="train[8:]",
    image_size=8,
    resize_size=8,
    batch_size=8,
    stages=(Stage("head", {"head": 1e-2}, epochs=1, anchor=L2SP()),),
)


def run(workdir):
    return finetune(RECIPE, workdir, data=IMAGES, model=NETWORK, console=QUIET)


@pytest.fixture
def full(disk):
    """Returns a function that fills the disk at a point of a run and returns the run's error."""

    def error(point, at=None):
        filled = before(point, lambda *_, **__: disk.fill(but=0), at)
        no_space = pytest.raises((JaxftError, OSError), match="No space left on device")
        with filled, no_space as raised:
            run(disk.folder / "run")
        disk.free()
        assert "\n" not in str(raised.value)
        return str(raised.value)

    return error


# Orbax leaves a coroutine behind.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_before_training_names_the_file(full, disk):
    workdir = disk.folder / "run"
    assert str(workdir / "environment.json") in full("write", "environment.json")
    assert f"{workdir / 'start'} could not be written" in full("save start")
    run(workdir)
    assert [row["epoch"] for row in rows(workdir)] == [1]


@pytest.mark.slow
def test_full_disk_at_export_names_the_file(full, disk):
    workdir = disk.folder / "run"
    run(workdir)
    expected = {name: (workdir / name).read_bytes() for name in ("model.safetensors", "model.json")}
    for name in expected:
        for file in expected:
            (workdir / file).unlink()
        assert str(workdir / name) in full("write", name)
        run(workdir)
        assert {file: (workdir / file).read_bytes() for file in expected} == expected
