"""`on_nonfinite`: the run ends and can be resumed, or skips steps that are not finite."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mortal import QUIET, RECIPE, assert_same_end, killed, rows, steps
from test_step import MODEL, PREPROCESSING, batch

from jaxft import EMA, Adam, NonFiniteError, Stage, data, finetune, models, partition, plan
from jaxft.models import Linen
from jaxft.optim.transform import GroupState
from jaxft.train.train_step import StepConfig, TrainState, train_step

pytestmark = pytest.mark.usefixtures("shared_programs")


class DividesByZero(nn.Module):
    """Divides by zero on a white image."""

    @nn.compact
    def __call__(self, x):
        darkest = x.min((1, 2, 3))[:, None]
        return nn.Dense(2, name="head")(nn.Dense(3)(x.mean((1, 2)))) / (1 - darkest)


def images():
    """Returns eleven images to train on, one white: in one of six steps of an epoch."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 200, (15, 8, 8, 3), np.uint8)
    pixels[3] = 255
    source = data.arrays(pixels, np.arange(15) % 2, ("a", "b"))
    return data.Splits(source.take(np.arange(11)), source.take(np.arange(11, 15)))


STOPPING = dataclasses.replace(
    RECIPE,
    model="divides",
    weights=None,
    data="white",
    train_split=None,
    val_split=None,
    shots=None,
    dropout=0.0,
    batch_size=2,
    augment="none",
    mean=(0.0,) * 3,
    std=(1.0,) * 3,
    stages=(Stage("head", {"head": 1e-2}, 1), Stage("all", {"*": 1e-2}, 2, carry="keep")),
)
SKIPPING = dataclasses.replace(STOPPING, on_nonfinite="skip")
NETWORK = Linen(DividesByZero(), shape=(8, 8, 3), head="head")


def run(recipe, workdir):
    return finetune(recipe, workdir, data=images(), model=NETWORK, console=QUIET)


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("skipping")
    run(SKIPPING, workdir)
    return workdir


@pytest.mark.slow
def test_nonfinite_steps_are_skipped_and_counted(skipping):
    assert [row["skipped_steps"] for row in rows(skipping)] == [1, 1, 1]
    for row in rows(skipping):
        assert np.isfinite([row["train_loss"], *row["gradient_norms"].values()]).all()


@pytest.mark.slow
@pytest.mark.parametrize("synced", [1, 10])
def test_nonfinite_step_ends_run_which_resumes_by_skipping(synced, skipping, tmp_path):
    """No checkpoint follows the step, however late the host reads the losses."""
    recipe = dataclasses.replace(STOPPING, sync_steps=synced)
    with pytest.raises(NonFiniteError, match=r"'head', epoch 1, step \d: the loss is ") as stop:
        run(recipe, tmp_path)
    said = str(stop.value)
    step = int(said.partition("step ")[2][0])
    good = (step - 1) // 3 * 3
    assert steps(tmp_path) == ([good] if good else [])
    assert (f"The checkpoint of step {good} is good. " in said) == bool(good)
    assert "With --on-nonfinite skip the same command resumes" in said
    run(SKIPPING, tmp_path)
    assert_same_end(tmp_path, skipping)


@pytest.mark.slow
def test_resume_restores_number_of_skipped_steps(skipping, tmp_path):
    with killed("step", 12):
        run(SKIPPING, tmp_path)
    run(SKIPPING, tmp_path)
    assert_same_end(tmp_path, skipping)


@pytest.mark.slow
def test_skipped_step_changes_only_the_schedule_position():
    """Weights, statistics, moments and their count, the average and its count stay."""
    params, stats = MODEL.init(jax.random.key(0))
    params["conv1"] = jax.tree.map(lambda x: x * jnp.nan, params["conv1"])
    (stage,) = plan([Stage("head", {"fc": 1e-3}, 1)], params)
    transform, ema = stage.transform(Adam()), EMA(0.5, every=2)
    trainable, frozen = partition(params, stage.labels)
    step = train_step(
        StepConfig(
            model=MODEL,
            transform=transform,
            preprocessing=PREPROCESSING,
            norms="batch",
            labels=stage.labels,
            ema=ema,
            skip_nonfinite=True,
        )
    )

    def start():
        average = ema.start(trainable, stats)
        state = TrainState(trainable, stats, transform.init(params), average)
        return jax.tree.map(jnp.copy, state)

    after, record = step(start(), frozen, batch(), jax.random.key(0))
    expected = jax.tree.map(
        lambda x: x._replace(position=x.position + 1) if isinstance(x, GroupState) else x,
        start(),
        is_leaf=lambda x: isinstance(x, GroupState),
    )
    assert not record.finite
    assert not any(map(np.any, jax.tree.leaves(record)))
    jax.tree.map(np.testing.assert_array_equal, after, expected)


class Overflows(nn.Module):
    """Has a norm layer whose statistics become infinite and whose output is not used."""

    @nn.compact
    def __call__(self, x, train: bool):
        nn.BatchNorm(use_running_average=not train, name="aside")(jnp.exp(1000 * x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


ONE = dataclasses.replace(STOPPING, stages=(Stage("all", {"*": 1e-2}, 1),))


@pytest.mark.slow
def test_infinite_running_statistics_end_the_run(tmp_path):
    network = Linen(Overflows(), shape=(8, 8, 3), head="head")
    told = r"step 1: the loss is 0\.\d+, but running statistics of aside are not finite"
    with pytest.raises(NonFiniteError, match=told) as stop:
        finetune(ONE, tmp_path, data=images(), model=network, console=QUIET)
    assert "rates" not in str(stop.value)  # none has been used yet


@pytest.mark.slow
def test_nonfinite_validation_loss_at_start_ends_the_run(tmp_path):
    train, val = images()
    swapped = data.Splits(val, train)  # the white image is one to validate
    told = r"stage 'all', before the first step: the validation loss is (nan|inf)\. Look"
    with pytest.raises(NonFiniteError, match=told) as stop:
        finetune(ONE, tmp_path, data=swapped, model=NETWORK, console=QUIET)
    assert "lower learning rates" not in str(stop.value).lower()
    skipping = dataclasses.replace(ONE, on_nonfinite="skip")
    finetune(skipping, tmp_path, data=swapped, model=NETWORK, console=QUIET)


class Drifts(nn.Module):
    """Evaluates to NaN after its first training step."""

    @nn.compact
    def __call__(self, x, train: bool):
        logits = nn.Dense(2, name="head")(x.mean((1, 2)))
        moved = self.param("moved", nn.initializers.zeros, (2,))
        return logits + moved if train else logits + jnp.where(moved == 0, 0, jnp.nan)


@pytest.mark.slow
def test_nonfinite_validation_loss_after_epoch_ends_the_run(tmp_path):
    network = Linen(Drifts(), shape=(8, 8, 3), head="head")
    told = r"'all', epoch 1, step 6: the validation loss is nan, though loss and gradients"
    with pytest.raises(NonFiniteError, match=told):
        finetune(ONE, tmp_path, data=images(), model=network, console=QUIET)


PLACES = {"stem": "conv1", "layer2": "layer2.0.conv1", "layer3": "layer3.0.conv2"}
OVERFLOWING = dataclasses.replace(
    ONE, model="cifar_resnet8", stages=(Stage("head", {"fc": 1e-2}, 2),)
)


def overflow(recipe, workdir, block, *, train=False, val=False):
    """Trains with finite weights that overflow in a frozen block, for all images but black ones."""
    pixels = np.zeros((14, 8, 8, 3), np.uint8)
    pixels[3], pixels[11] = 255 * train, 255 * val
    source = data.arrays(pixels, np.arange(14) % 2, ("a", "b"))
    splits = data.Splits(source.take(np.arange(10)), source.take(np.arange(10, 14)))
    params, stats = models.create("cifar_resnet8", num_classes=2).init(jax.random.key(0))
    params = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            3e38 * jnp.sign(x) if ".".join(k.key for k in path[:-1]) == PLACES[block] else x
        ),
        params,
    )
    return finetune(recipe, workdir, data=splits, start=(params, stats), console=QUIET)


@pytest.mark.slow
@pytest.mark.parametrize("cache_mib", [0, 512])
@pytest.mark.parametrize("block", PLACES)
def test_nonfinite_frozen_block_in_validation_ends_the_run(block, cache_mib, tmp_path):
    recipe = dataclasses.replace(OVERFLOWING, cache_mib=cache_mib)
    told = (
        r"stage 'head': the features of validation image 1 \(counted from 0, of 4 images\) are not "
        "finite after the frozen blocks stem to layer3"
        if cache_mib
        else r"stage 'head', before the first step: the validation loss is (nan|inf)\. "
        rf"The first block whose output is not finite is '{block}'\. "
    )
    with pytest.raises(NonFiniteError, match=told):
        overflow(recipe, tmp_path, block, val=True)


@pytest.mark.slow
@pytest.mark.parametrize("cache_mib", [0, 512])
@pytest.mark.parametrize("block", PLACES)
def test_nonfinite_frozen_block_in_training_ends_the_run(block, cache_mib, tmp_path):
    recipe = dataclasses.replace(OVERFLOWING, cache_mib=cache_mib)
    told = (
        r"features of training image 3 \(counted from 0, of 10 images\)"
        if cache_mib
        else r"step \d: the loss is (nan|inf)\. "
    )
    with pytest.raises(NonFiniteError, match=told):
        overflow(recipe, tmp_path, block, train=True)


@pytest.mark.slow
@pytest.mark.parametrize("cache_mib", [0, 512])
def test_steps_with_nonfinite_frozen_block_are_skipped(cache_mib, tmp_path):
    recipe = dataclasses.replace(OVERFLOWING, cache_mib=cache_mib, on_nonfinite="skip")
    overflow(recipe, tmp_path, "layer2", train=True, val=True)
    for row in rows(tmp_path):
        assert row["skipped_steps"] == 1
        assert np.isfinite(row["train_loss"])
        assert row["val_loss"] is None  # not finite


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batch_of_zero_class_weights(reduction, tmp_path):
    """The sum is 0, as in torch; the mean is not finite, and the error names the class weights."""
    pixels = np.random.default_rng(0).integers(0, 200, (5, 8, 8, 3), np.uint8)
    source = data.arrays(pixels, np.array([1, 1, 1, 0, 0]), ("a", "b"))
    splits = data.Splits(source.take(np.arange(4)), source.take(np.array([4])))
    stage = dataclasses.replace(ONE.stages[0], class_weights=(1.0, 0.0))
    recipe = dataclasses.replace(ONE, reduction=reduction, stages=(stage,))
    if reduction == "sum":
        finetune(recipe, tmp_path, data=splits, model=NETWORK, console=QUIET)
        assert np.isfinite(rows(tmp_path)[0]["train_loss"])
        return
    with pytest.raises(NonFiniteError, match=r"all 2 images .* class_weights are 0") as stop:
        finetune(recipe, tmp_path, data=splits, model=NETWORK, console=QUIET)
    assert "rates" not in str(stop.value)
