"""Runs and steps with `EMA`: the count of steps, resume, accumulation, several steps a call."""

import dataclasses
from itertools import pairwise

import jax
import numpy as np
import pytest
from faults import before
from flax import linen as nn
from mortal import QUIET, assert_close, assert_same_end, killed, rows
from safetensors.numpy import load_file

from jaxft import EMA, Adam, Recipe, Stage, data, finetune, models, plan
from jaxft.checkpoint.contents import Snapshot
from jaxft.devices import Devices
from jaxft.train.compiled_stage import compile_stage
from jaxft.train.stage_program import build_program

pytestmark = pytest.mark.usefixtures("shared_programs")

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
IMAGES = data.arrays(PIXELS, np.arange(24) % 2, classes=["a", "b"])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Dense(8, name="early")(x))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, name="norm")(x))
        x = nn.relu(nn.Dense(8, name="late")(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


NETWORK = models.Linen(Net(), shape=(8, 8, 3), head="head")
AVERAGED = Stage(
    "late",
    {"head": 1e-1, "late": 1e-2, "norm": 1e-2},
    epochs=4,
    carry="keep",
    accumulate=2,
    ema=EMA(0.6, every=3, warmup=True),
)
RECIPE = Recipe(
    model="net",
    data="noise",
    optimizer=Adam(),
    train_split="train[:16]",
    val_split="train[16:]",
    image_size=8,
    resize_size=8,
    batch_size=4,
    augment="flip",
    checkpoint_steps=3,
    # Four steps an epoch: the average moves at steps 1, 4, 7, 10, 13 and 16 of the second stage.
    stages=(Stage("head", {"head": 1e-2}, epochs=1), AVERAGED),
)


def run(workdir, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    return finetune(recipe, workdir, data=IMAGES, model=NETWORK, console=QUIET)


@pytest.fixture(scope="module")
def validated():
    """Parameters of each validation of the whole run: the start, then each epoch."""
    return []


@pytest.fixture(scope="module")
def whole(tmp_path_factory, validated):
    workdir = tmp_path_factory.mktemp("whole")

    def keep(trainer, program, params, *_):
        validated.append(jax.tree.map(np.array, params))

    with before("evaluate", keep):
        run(workdir)
    return workdir


@pytest.mark.slow
def test_average_of_a_run_moves_at_every_third_step(whole, validated):
    """Also frozen weights are bit-identical, and the best epoch's average is exported."""
    epochs = validated[2:]
    for params in validated[1:]:
        jax.tree.map(np.testing.assert_array_equal, params["early"], validated[0]["early"])
    ends = [params["late"]["kernel"] for params in epochs]
    assert all((a != b).any() for a, b in pairwise(ends))
    accuracies = [row["val_accuracy"] for row in rows(whole)]
    best = max(range(len(accuracies)), key=accuracies.__getitem__)
    exported = load_file(whole / "model.safetensors")
    shapes = {x.shape: x for x in exported.values()}
    kernel = validated[best + 1]["late"]["kernel"]
    np.testing.assert_array_equal(shapes[kernel.shape], kernel)


@pytest.mark.slow
@pytest.mark.parametrize("step", [5, 9, 18])
def test_resume_restores_number_of_averaged_steps(step, whole, tmp_path):
    """Kills before the first update of the average, between two updates, and after a checkpoint."""
    with killed("step", step):
        run(tmp_path)
    run(tmp_path)
    assert_same_end(tmp_path, whole)


@pytest.mark.slow
def test_average_does_not_depend_on_steps_per_execution(whole, tmp_path):
    run(tmp_path, steps_per_execution=4, checkpoint_steps=0)
    assert_close(tmp_path, whole)


def states_of(stage):
    """Yields the state of a stage at its start, then after each step of two epochs."""
    recipe = dataclasses.replace(RECIPE, stages=(stage,))
    params, stats = NETWORK.init(jax.random.key(0))
    (planned,) = plan([stage], params)
    program = build_program(0, planned, recipe, NETWORK, IMAGES, Devices(), (params, stats))
    at = Snapshot(params, stats, program.transform().init(params))
    compiled = compile_stage(program, at)
    state, frozen = program.state(at)
    state = compiled.copy(state)
    yield jax.device_get(state)
    for number, batch in enumerate(program.batches(IMAGES, stop_epoch=2)):
        batch = program.devices.batch(batch)
        state, _ = compiled.step(state, frozen, batch, np.int32(number), None)
        yield jax.device_get(state)


def test_average_of_steps_is_that_of_a_loop():
    start, *after = states_of(dataclasses.replace(AVERAGED, epochs=2))
    assert len(after) == 12
    average, k = (start.trainable, start.stats), 0
    for i, state in enumerate(after):
        if i % 3 == 0:
            k += 1
            decay = min(0.6, 1 - k ** (-2 / 3))
            average = jax.tree.map(
                lambda a, x, decay=decay: decay * np.float64(a) + (1 - decay) * np.float64(x),
                average,
                (state.trainable, state.stats),
            )
        *found, steps = state.average
        assert steps == i + 1
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
            tuple(found),
            average,
        )
