"""Padding of a batch changes nothing."""

import dataclasses

import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from mortal import QUIET, assert_close, assert_same_end, rows

from jaxft import SGD, Recipe, Stage, data, finetune
from jaxft.batch_sizes import BatchSizes, oversized
from jaxft.lr_finder import ramp, range_test, trial
from jaxft.models import NNX, Linen


class Standardises(nn.Module):
    """Divides each image by its standard deviation: NaN for an image of zeros."""

    @nn.compact
    def __call__(self, x, train: bool):
        x = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
        x = nn.BatchNorm(use_running_average=not train)(nn.Conv(4, (3, 3))(x))
        return nn.Dense(2, name="head")(nn.relu(x).mean((1, 2)))


class Mixes(nnx.Module):
    """Centres each batch itself, and normalises rows of another axis than the batch."""

    def __init__(self, *, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        x = (x - x.mean(0)) / x.std()
        tokens = self.norm(x.reshape(-1, 3)).reshape(len(x), -1, 3)
        return self.head(nnx.relu(tokens).mean(1))


pytestmark = pytest.mark.usefixtures("stage_ends_only")

NETWORKS = {
    "linen": Linen(Standardises(), shape=(8, 8, 3), head="head"),
    "nnx": NNX(Mixes, shape=(8, 8, 3), head="head"),
}
RECIPE = Recipe(
    model="own",
    data="noise",
    optimizer=SGD(momentum=0.9),
    batch_size=10,
    image_size=8,
    resize_size=8,
    augment="none",
    workers=0,
    stages=(Stage("all", {"*": 1e-2}, epochs=1, restore="last", ema=0.5),),
)


def noise(count=10):
    pixels = np.random.default_rng(0).integers(0, 256, (2 * count, 8, 8, 3), np.uint8)
    source = data.arrays(pixels, np.arange(2 * count) % 2, classes=["a", "b"])
    return data.Splits(source.take(np.arange(count)), source.take(np.arange(count, 2 * count)))


def run(workdir, network, splits=None, *, stage=None, **changes):
    stages = tuple(dataclasses.replace(each, **stage or {}) for each in RECIPE.stages)
    recipe = dataclasses.replace(RECIPE, stages=stages, **changes)
    finetune(recipe, workdir, data=splits or noise(), model=NETWORKS[network], console=QUIET)
    assert all(np.isfinite([row["train_loss"], row["val_loss"]]).all() for row in rows(workdir))
    return workdir


@pytest.fixture(scope="module")
def full(stage_ends_only, tmp_path_factory):
    """Maps networks to folders of runs whose only batch is full."""
    return {network: run(tmp_path_factory.mktemp(network), network) for network in NETWORKS}


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_padding_of_a_batch_changes_nothing(network, full, tmp_path):
    """Ten images in batches of ten or, at most, of sixteen: losses, statistics, average, score."""
    assert_same_end(run(tmp_path / "run", network, batch_size=16), full[network])


@pytest.mark.slow
def test_padding_of_an_empty_accumulated_part_changes_nothing(full, tmp_path):
    workdir = run(tmp_path / "run", "nnx", batch_size=20, stage={"accumulate": 2})
    assert_same_end(workdir, full["nnx"])


@pytest.mark.slow
@pytest.mark.parametrize("network", NETWORKS)
def test_padding_of_accumulated_parts_changes_nothing(network, tmp_path):
    """Ten images in parts of 4, 4 and 2, without and with empty parts."""
    three = run(tmp_path / "three", network, batch_size=12, stage={"accumulate": 3})
    five = run(tmp_path / "five", network, batch_size=20, stage={"accumulate": 5})
    assert_same_end(five, three)


@pytest.mark.slow
def test_short_last_batch_ends_a_call(tmp_path):
    """Batches of 4, 4 and 2, one or three a call; the mirrored view has padding too."""
    one = run(tmp_path / "one", "nnx", batch_size=4, tta="flip")
    three = run(tmp_path / "three", "nnx", batch_size=4, tta="flip", steps_per_execution=3)
    assert_close(three, one)


@pytest.mark.slow
def test_range_test_and_relative_rates_ignore_padding():
    recipe = dataclasses.replace(RECIPE, batch_size=4)
    stage = dataclasses.replace(RECIPE.stages[0], auto_rgn=True)
    stage = ramp(stage, low=1e-5, high=1e-3, steps=10)
    tried = trial(recipe, stage, data=noise(), model=NETWORKS["linen"])
    assert np.isfinite(range_test(tried, low=1e-5, high=1e-3).losses).all()


def test_batch_size_above_number_of_images_is_a_remark():
    def remarks(masked, batch_size):
        return oversized([BatchSizes(batch_size, 8, batch_size, 8, masked)] * 2, 8)

    (remark,) = remarks(True, 64)
    assert "batch_size 64 is more than the 8 images to train on" in remark
    assert not remarks(True, 8)
    assert not remarks(False, 64)
