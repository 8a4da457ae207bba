"""`remat`: blocks are recomputed in the backward pass and less is stored between the passes."""

import dataclasses
from functools import partial

import jax
import numpy as np
import pytest

from jaxft import Recipe, Stage, data, models
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Splits
from jaxft.devices import Devices
from jaxft.train.stage_program import build_programs
from jaxft.train.train_step import block_by_block

MODEL = models.create("cifar_resnet8", num_classes=4, dropout=0.2, drop_path=0.2)
START = MODEL.init(jax.random.key(0))
RNG = np.random.default_rng(0)
BATCH = Batch(
    RNG.integers(0, 256, (8, 32, 32, 3), np.uint8),
    np.arange(8, dtype=np.int32) % 4,
    np.arange(8) < 7,
)
ALL = Stage("all", {"*": 0.1}, 1)
LATE = Stage("late", {"layer3": 0.1, "fc": 0.1}, 1, accumulate=2)
RECIPE = Recipe(
    model=MODEL.name, data="given", batch_size=8, image_size=32, resize_size=32, augment="none",
    dropout=0.2, drop_path=0.2,
    stages=(ALL,),
)  # fmt: skip


IMAGES = Splits(*[data.arrays(*BATCH[:2], classes=list("abcd"))] * 2)


def program(**fields):
    recipe = dataclasses.replace(RECIPE, **fields)
    return build_programs(recipe, MODEL, IMAGES, Devices(), START)[0]


def stepped(program):
    """Returns the state after a step, and its record with gradients."""
    state, frozen = program.state(Snapshot(*START, program.transform().init(START[0])))
    step = jax.jit(program.train_step(keep_gradients=True))
    return step(state, frozen, BATCH, np.int32(3))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [ALL, LATE], ids=["all", "late"])
def test_remat_changes_no_step(stage):
    plain, again = (stepped(program(stages=(stage,), remat=remat)) for remat in (False, True))

    def near(a, b):
        scale = np.abs(a).max(initial=1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * scale)

    jax.tree.map(near, plain, again)


def test_remat_stores_less():
    """Counts bytes between forward and backward pass, with parameters."""

    def remembered(apply):
        def loss(params, stats, x):
            return apply(params, stats, x, norms="batch")[0].sum()

        x = jax.ShapeDtypeStruct((8, 32, 32, 3), np.float32)
        held = jax.eval_shape(lambda *args: jax.vjp(loss, *args)[1], *START, x)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(held))

    into_blocks = 8 * 4 * (32 * 32 * (3 + 16 + 16) + 16 * 16 * 32 + 8 * 8 * 64)
    parameters = sum(leaf.nbytes for leaf in jax.tree.leaves(START))
    assert into_blocks < remembered(partial(block_by_block, MODEL)) < into_blocks + 2 * parameters
    assert remembered(MODEL.apply) > 4 * into_blocks


@pytest.mark.slow
def test_remat_adds_flops_of_one_forward_pass():
    """In the program before optimization: XLA merges some of it on CPU."""

    def asked(function, *args):
        return function.lower(*args).cost_analysis()["flops"]

    state, frozen = program().state(Snapshot(*START, program().transform().init(START[0])))
    plain, again = (
        asked(jax.jit(program(remat=remat).train_step()), state, frozen, BATCH, np.int32(0))
        for remat in (False, True)
    )
    forward = jax.jit(partial(MODEL.apply, norms="batch"))
    once = asked(forward, *START, BATCH.image.astype(np.float32))
    assert 0.98 < (again - plain) / once < 1.02
