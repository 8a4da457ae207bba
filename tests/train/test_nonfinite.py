"""Steps whose loss or gradients are not finite: the run ends and can go on, or leaves them out."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mortal import QUIET, RECIPE, KilledError, assert_same_end, die, rows, steps
from test_step import MODEL, PREPROCESSING, batch

from jaxft import Adam, NonFiniteError, Stage, data, finetune, partition, plan
from jaxft.models import Linen
from jaxft.optim import GroupState
from jaxft.train.progress import Progress
from jaxft.train.step import TrainState, train_step


class DividesByZero(nn.Module):
    """On an image that is white all over."""

    @nn.compact
    def __call__(self, x):
        darkest = x.min((1, 2, 3))[:, None]
        return nn.Dense(2, name="head")(nn.Dense(3)(x.mean((1, 2)))) / (1 - darkest)


def images():
    """Eleven to train on, one of them white: one of an epoch's six steps meets it."""
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


def test_such_steps_are_left_out_and_counted(skipping):
    assert [row["skipped_steps"] for row in rows(skipping)] == [1, 1, 1]
    for row in rows(skipping):
        assert np.isfinite([row["train_loss"], *row["gradient_norms"].values()]).all()


@pytest.mark.parametrize("synced", [1, 10])
def test_it_stops_at_the_step_and_can_go_on_without_it(synced, skipping, tmp_path):
    """However late the host looks at the losses, no checkpoint comes in between."""
    recipe = dataclasses.replace(STOPPING, sync_steps=synced)
    with pytest.raises(NonFiniteError, match=r"'head', epoch 1, step \d: the loss is ") as stop:
        run(recipe, tmp_path)
    said = str(stop.value)
    step = int(said.partition("step ")[2][0])
    good = (step - 1) // 3 * 3
    assert steps(tmp_path) == ([good] if good else [])
    assert (f"The checkpoint of step {good} is good. " in said) == bool(good)
    assert "With --on-nonfinite skip the same command goes on" in said
    run(SKIPPING, tmp_path)
    assert_same_end(tmp_path, skipping)


def test_what_was_skipped_is_known_to_who_goes_on(skipping, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        die(patch, Progress, "after_step", lambda progress: progress.step == 11)
        with pytest.raises(KilledError):
            run(SKIPPING, tmp_path)
    run(SKIPPING, tmp_path)
    assert_same_end(tmp_path, skipping)


def test_a_step_that_is_not_taken_changes_nothing_but_that_the_schedule_goes_on():
    """Of weights, statistics, moments and their count, and the average."""
    params, stats = MODEL.init(jax.random.key(0))
    params["conv1"] = jax.tree.map(lambda x: x * jnp.nan, params["conv1"])
    (stage,) = plan([Stage("head", {"fc": 1e-3}, 1)], params)
    transform = stage.transform(Adam())
    trainable, frozen = partition(params, stage.labels)
    step = train_step(
        MODEL, transform, PREPROCESSING, "batch", labels=stage.labels, ema=0.5, skip_nonfinite=True
    )

    def start():
        state = TrainState(trainable, stats, transform.init(params), (trainable, stats))
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
    """The statistics of one norm layer become infinite; its output goes nowhere."""

    @nn.compact
    def __call__(self, x, train: bool):
        nn.BatchNorm(use_running_average=not train, name="aside")(jnp.exp(1000 * x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


ONE = dataclasses.replace(STOPPING, stages=(Stage("all", {"*": 1e-2}, 1),))


def test_statistics_that_become_infinite_end_the_run_and_are_named(tmp_path):
    network = Linen(Overflows(), shape=(8, 8, 3), head="head")
    told = r"step 1: the loss is 0\.\d+, but running statistics of aside are not finite"
    with pytest.raises(NonFiniteError, match=told) as stop:
        finetune(ONE, tmp_path, data=images(), model=network, console=QUIET)
    assert "rates" not in str(stop.value)  # none has been used yet


def test_validation_loss_that_is_not_finite_ends_the_run(tmp_path):
    train, val = images()
    swapped = data.Splits(val, train)  # the white image is one to validate
    told = r"'all', epoch 1, step 2: the validation loss is (nan|inf), though loss and gradients"
    with pytest.raises(NonFiniteError, match=told) as stop:
        finetune(ONE, tmp_path, data=swapped, model=NETWORK, console=QUIET)
    assert "lower rates" not in str(stop.value).lower()
    skipping = dataclasses.replace(ONE, on_nonfinite="skip")
    finetune(skipping, tmp_path, data=swapped, model=NETWORK, console=QUIET)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batch_whose_classes_all_weigh_nothing(reduction, tmp_path):
    """As in torch the sum is 0; there is no mean, and the message names the class weights."""
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
