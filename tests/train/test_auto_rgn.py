"""Auto-RGN against the authors' loop in torch, recorded in float64."""

import dataclasses
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import weight
from faults import before
from float64_stages import assert_as_recorded, normalizing_in_float64, samples
from mortal import QUIET, assert_same_end, killed, saving_stage_ends_only
from test_ddp import batch

from jaxft import SGD, Recipe, ReduceLROnPlateau, Stage, data, finetune, models, plan
from jaxft.checkpoint import weights_only
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Splits
from jaxft.devices import Devices
from jaxft.optim import schedules
from jaxft.optim.transform import restart
from jaxft.strategies import auto_rgn
from jaxft.train.auto_rgn import factors, relative_norms
from jaxft.train.metrics import GradientNorms
from jaxft.train.stage_program import build_program
from jaxft.weights.key_maps import torch_tensors

with jax.enable_x64(True):
    MODEL = models.create("cifar_resnet8", num_classes=10, dtype="float64")
    TENSORS = torch_tensors(*jax.eval_shape(MODEL.init, jax.random.key(0)))
GOLDEN = Path(__file__).parents[1] / "golden" / "auto_rgn.npz"
RATES, GAMMA, EPOCHS, BATCH = {"**.kernel": 1e-2, "fc": 5e-3}, 0.5, 3, 3
# Seven batches an epoch, the last of one image; the first five are measured.
SOURCE = data.arrays(
    np.concatenate([batch(k).image for k in range(3)])[:19],
    np.concatenate([batch(k).target for k in range(3)])[:19],
    classes="0123456789",
)
(STAGE,) = auto_rgn(
    RATES, 1.0, epochs=EPOCHS, restore="last", schedule=schedules.ExponentialLR(GAMMA)
)
RECIPE = Recipe(
    model=MODEL.name, data="noise", stages=(dataclasses.replace(STAGE, train=RATES),),
    batch_size=BATCH, image_size=16, resize_size=16, augment="none", workers=0, checkpoint_steps=3,
)  # fmt: skip


@pytest.fixture(autouse=True)
def wide():
    with normalizing_in_float64(), jax.enable_x64(True):
        yield


def start():
    return jax.tree.map(lambda t: jnp.asarray(t.from_torch(weight(t.name, t.shape))), TENSORS)


def run(workdir):
    splits = Splits(SOURCE, SOURCE)
    finetune(RECIPE, workdir, data=splits, model=MODEL, start=start(), console=QUIET)


@pytest.mark.slow
@pytest.mark.usefixtures("shared_programs")
def test_auto_rgn_of_killed_run_is_the_authors(golden, tmp_path):
    """Killed in its second epoch, and in the first step of the third."""
    measured = []
    with before("auto_rgn", lambda *_, step, **__: measured.append(step)), saving_stage_ends_only():
        run(tmp_path / "unbroken")
    assert measured == [0, 7, 14]
    for step in (11, 15):
        with killed("step", step):
            run(tmp_path / "killed")
    with saving_stage_ends_only():
        run(tmp_path / "killed")
    assert_same_end(tmp_path / "killed", tmp_path / "unbroken")

    ended = weights_only.read_weights(tmp_path / "killed" / "checkpoints")
    named = zip(
        jax.tree.leaves(TENSORS),
        jax.tree.leaves(jax.tree.map(lambda t, x: t.to_torch(x), TENSORS, ended)),
        strict=True,
    )
    assert_as_recorded({"end": samples({t.name: x for t, x in named})}, golden)


def test_recording_of_auto_rgn_is_torchs(golden):
    pytest.importorskip("torch")
    from record_auto_rgn import record

    assert_as_recorded(record(), golden)


def gauge(gradients, weights):
    def norms(values):
        return dict(zip("abc", map(np.float64, values), strict=True))

    return GradientNorms(norms(gradients), norms(weights))


@pytest.mark.parametrize(
    ("gauges", "expected"),
    [
        ([gauge((1, 2, 3), (2, 2, 2))], (1 / 3, 2 / 3, 1)),
        # the mean of ratios, not the ratio of means
        ([gauge((1, 2, 4), (2, 2, 2)), gauge((8, 3, 6), (8, 2, 4))], (3 / 7, 5 / 7, 1)),
        ([gauge((1, 2, 4), (2, 2, 2)), gauge((9, math.nan, 9), (1, 1, 1))], (0.25, 0.5, 1)),
        ([gauge((1, 2, 4), (2, 2, 0))], (0.5, 1, 1)),  # c is a head of zeros: at its base rate
        ([gauge((1, 2, 0), (2, 2, 0))], (0.5, 1, 1)),
        ([gauge((1, 0, 4), (2, 2, 2))], (0.25, 0, 1)),
        ([gauge((0, 0, 0), (2, 2, 2))], (0, 0, 0)),
        ([gauge((9, math.nan, 9), (1, 1, 1))], (1, 1, 1)),
    ],
)  # fmt: skip
def test_auto_rgn_factors(gauges, expected):
    found = factors({"a": 0, "b": 0, "c": 0, "frozen": 0}, relative_norms(gauges))
    assert tuple(found.values()) == pytest.approx((*expected, 1))
    assert not any(map(math.isnan, found.values()))


@pytest.mark.slow
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_auto_rgn_ignores_batch_that_is_not_finite(on_nonfinite):
    recipe = dataclasses.replace(RECIPE, on_nonfinite=on_nonfinite)
    params, stats = start()
    (stage,) = plan(recipe.stages, params)
    made = build_program(0, stage, recipe, MODEL, SOURCE, Devices(), (params, stats))
    state, frozen = made.state(Snapshot(params, stats, made.transform().init(params)))
    images = np.full((BATCH, 16, 16, 3), np.nan)
    noise = Batch(images, np.zeros(BATCH, np.int32), np.ones(BATCH, bool))
    found = jax.jit(made.gradient_norms(made.tensor_labels()))(state, frozen, noise, np.int32(0))
    assert np.isnan([*found.gradients.values()]).all()
    assert relative_norms([found]) == {}


def test_restart_keeps_schedules_and_parked_state():
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    fields = {"schedule": ReduceLROnPlateau(patience=0), "carry": "keep", "auto_rgn": True}
    first, second, _ = plan(
        [
            Stage("first", {"c": 1.0}, 1),
            Stage("second", {"a": 1.0, "b": 10.0}, 9, **fields),
            Stage("third", {"*": 1.0}, 1, carry="keep"),
        ],
        params,
    )  # fmt: skip
    assert second.park == first.lr.keys()
    tx = second.transform(SGD(momentum=0.5))
    state = tx.init(params)
    parked = {"c": jnp.full(2, 7.0)}
    state.inner_states["frozen"] = state.inner_states["frozen"]._replace(inner_state=parked)
    gradients = {"a": jnp.ones(2), "b": jnp.ones(2), "c": None}
    updates, state = tx.update(gradients, state, params)
    assert [updates[name][0] for name in "ab"] == [-1, -10]  # factors begin as 1
    for _ in range(2):  # no better: the rate falls to a tenth
        state = second.after_epoch(state, loss=1.0)
    state = restart(state, tx.init(params), {"a": 0.5, "b": 0.25, "c": 1.0})
    assert state.inner_states["frozen"].inner_state is parked
    assert [int(state.inner_states[name].inner_state.position) for name in "ab"] == [1, 1]
    for share in (1, 1.5):  # the momentum starts from zero
        updates, state = tx.update(gradients, state, params)
        assert [float(updates[name][0]) for name in "ab"] == pytest.approx(
            [-0.1 * 0.5 * share, -1 * 0.25 * share]
        )
