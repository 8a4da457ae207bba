"""Runs with complete optimizers of optax: resume, and the weights that validation sees."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from faults import before
from flax import linen as nn
from mortal import QUIET, assert_same_end, killed
from safetensors.numpy import load_file

from jaxft import EMA, Optax, Recipe, Stage, data, finetune, models, plan, schedules
from jaxft.checkpoint.contents import Snapshot
from jaxft.devices import Devices
from jaxft.train.compiled_stage import compile_stage
from jaxft.train.metrics import Score
from jaxft.train.stage_program import build_program
from jaxft.train.state import Progress, StageState

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)
IMAGES = data.arrays(PIXELS, np.arange(24) % 2, classes=["a", "b"])


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.relu(nn.Dense(8, name="early")(x))
        x = nn.relu(nn.Dense(8, name="late")(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


NETWORK = models.Linen(Net(), shape=(8, 8, 3), head="head")
RECIPE = Recipe(
    model="net",
    data="noise",
    train_split="train[:16]",
    val_split="train[16:]",
    image_size=8,
    resize_size=8,
    batch_size=4,
    checkpoint_steps=3,
    stages=(  # of four steps an epoch
        Stage("head", {"head": 3e-2}, epochs=1),
        Stage(
            "late",
            {"head": 1e-1, "late": 1e-2},
            epochs=3,
            carry="keep",
            schedule=schedules.CosineAnnealingLR(by="step"),
        ),
    ),
)
SCHEDULE_FREE = "optax.contrib.schedule_free_adamw"
pytestmark = pytest.mark.slow


def run(workdir, function, **changes):
    recipe = dataclasses.replace(RECIPE, optimizer=Optax(function), **changes)
    return finetune(recipe, workdir, data=IMAGES, model=NETWORK, console=QUIET)


@pytest.mark.parametrize("function", [SCHEDULE_FREE, "optax.contrib.prodigy", "optax.contrib.muon"])
def test_killed_run_ends_as_unbroken(function, tmp_path):
    """The kill comes within the second stage, two steps after a checkpoint."""
    run(tmp_path / "whole", function)
    with killed("step", 11):
        run(tmp_path / "killed", function)
    run(tmp_path / "killed", function)
    assert_same_end(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize("ema", [None, EMA(0.5)], ids=["raw", "ema"])
def test_schedule_free_stage_validates_its_average(ema):
    """Also an EMA averages the weights to evaluate, and a next stage continues from them."""
    stage = dataclasses.replace(RECIPE.stages[1], optimizer=Optax(SCHEDULE_FREE), ema=ema)
    recipe = dataclasses.replace(RECIPE, stages=(stage,))
    start = NETWORK.init(jax.random.key(0))
    (planned,) = plan([stage], start[0])
    program = build_program(0, planned, recipe, NETWORK, IMAGES, Devices(), start)
    at = Snapshot(*start, program.transform().init(start[0]))
    compiled = compile_stage(program, at)
    progress = Progress.at_start(0, 0, Score(1.0, 0.5, None))
    current = StageState.at_start(program, progress, at)
    jax.tree.map(np.testing.assert_array_equal, current.shown.params, start[0])
    current.state = compiled.copy(current.state)
    expected = start[0]["head"]["kernel"]
    for number, batch in enumerate(program.batches(IMAGES, stop_epoch=1)):
        batch = program.devices.batch(batch)
        current.state, _ = compiled.step(
            current.state, current.frozen, batch, np.int32(number), None
        )
        stepped = current.state.trainable["head"]["kernel"]
        state = current.state.opt_state.inner_states["head"].inner_state.rule
        z = state._replace(z=state.z["head"]["kernel"])
        evaluated = optax.contrib.schedule_free_eval_params(z, stepped)
        expected = (expected + evaluated) / 2 if ema else evaluated
        shown = current.shown.params["head"]["kernel"]
        np.testing.assert_allclose(shown, expected, rtol=1e-6, atol=1e-7)
    assert np.abs(shown - stepped).max() > 1e-4
    following = StageState.at_start(program, progress, current.shown)
    if not ema:
        for a, b in zip(*map(jax.tree.leaves, (following.state, current.state)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_schedule_free_run_exports_validated_weights(tmp_path):
    validated = []

    def keep(trainer, program, params, *_):
        validated.append(np.array(params["head"]["kernel"]))

    stages = tuple(dataclasses.replace(stage, restore="last") for stage in RECIPE.stages)
    with before("evaluate", keep):
        run(tmp_path, SCHEDULE_FREE, stages=stages)
    assert len({kernel.tobytes() for kernel in validated}) == 5  # the start and four epochs
    exported = load_file(tmp_path / "model.safetensors")
    assert any(
        x.shape == validated[-1].shape and np.array_equal(x, validated[-1])
        for x in exported.values()
    )
