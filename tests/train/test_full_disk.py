"""A full disk in each phase of a run that writes: one error, and the same command resumes."""

import numpy as np
import pytest
from flax import linen as nn
from mortal import QUIET, rows

from jaxft import L2SP, Adam, JaxftError, Recipe, Stage, data, finetune, models
from jaxft.checkpoint import atomic, weights_only
from jaxft.report import environment

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
def full(disk, monkeypatch):
    """Has a function find the disk full once its `when` is true; returns the run's error."""

    def error(owner, name, when=lambda path: True):
        real = getattr(owner, name)

        def fill_and_write(path, *args, **kwargs):
            if when(str(path)):
                disk.fill(but=0)
            return real(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, fill_and_write)
            with pytest.raises((JaxftError, OSError), match="No space left on device") as raised:
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
    assert str(workdir / "environment.json") in full(environment, "append")
    assert f"{workdir / 'start'} could not be written" in full(weights_only, "save_weights")
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
        message = full(atomic, "write", lambda path: path.endswith(name))  # noqa: B023
        assert str(workdir / name) in message
        run(workdir)
        assert {file: (workdir / file).read_bytes() for file in expected} == expected
