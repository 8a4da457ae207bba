"""Options of a step against the same in torch, recorded in float64."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from float64_stages import assert_as_recorded, rows, train
from test_ddp import MODEL, batch

from jaxft import L2SP, Recipe, Stage, data, plan
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Preprocessing
from jaxft.devices import Devices
from jaxft.optim.schedules import CosineAnnealingLR
from jaxft.train.compiled_stage import compile_stage, flops
from jaxft.train.eval_step import eval_step
from jaxft.train.stage_program import build_program

GOLDEN = Path(__file__).parents[1] / "golden" / "step_options.npz"
EMA = 0.75
WEIGHTS = (1.0, 0.5, 2.0, 4.0, 0.25, 1.0, 0.0, 3.0, 1.5, 1.0)


def late(name="x", **settings):
    return Stage(name, {"fc": 0.05, "layer3": 0.02}, steps=4, norms="batch", **settings)


CASES = {
    "accumulate": (late(accumulate=4),),
    "ema": (late(ema=EMA, clip_norm=3.0),),
    "values": (late(clip_value=0.01), late("y", clip_value=0.01, clip_norm=0.1)),
    # The second stage is still held to where the run began.
    "anchor": (late(anchor=L2SP(0.5, 0.25)), late("y", anchor=L2SP(2.0, 0.5), clip_norm=3.0)),
    "classes": (late(class_weights=WEIGHTS, label_smoothing=0.25),),
    "all": (
        late(
            clip_norm=3.0, accumulate=2, ema=EMA, anchor=L2SP(0.5, 0.25),
            class_weights=WEIGHTS, label_smoothing=0.25,
        ),
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_step_options_are_torchs(case, golden):
    trained = train(CASES[case])
    of_case = {name: x for name, x in golden.items() if name.startswith(f"{case}/")}
    assert_as_recorded({f"{case}/{name}": x for name, x in trained.items()}, of_case)


@pytest.mark.slow
def test_recording_of_step_options_is_torchs(golden):
    pytest.importorskip("torch")
    from record_stage_steps import recorded

    assert_as_recorded(recorded(CASES), golden)


def start_of(stage, **settings):
    """Returns a stage's compiled program, first state, frozen half, and initial params."""
    recipe = Recipe(
        model=MODEL.name, data="random", stages=(stage,), batch_size=8, image_size=16, **settings
    )
    params, stats = MODEL.init(jax.random.key(0))
    (planned,) = plan([stage], params)
    source = data.arrays(*rows(0), classes="0123456789")
    prepared = build_program(0, planned, recipe, MODEL, source, Devices(), (params, stats))
    at = Snapshot(params, stats, prepared.transform().init(params))
    compiled = compile_stage(prepared, at)
    state, frozen = prepared.state(at)
    return compiled, compiled.copy(state), frozen, params


@pytest.mark.slow
def test_ema_of_constant_leaves_is_bit_identical():
    """Rounding would change frozen layers in validation and in the exported model."""
    compiled, state, frozen, _ = start_of(Stage("x", {"fc": 0.05}, steps=99, ema=0.999))
    pretrained = jax.tree.map(lambda x: x + jnp.linspace(0.1, 0.9, x.size), state.stats)
    average = (state.average[0], jax.tree.map(jnp.copy, pretrained))
    state = state._replace(stats=pretrained, average=average)
    before = jax.tree.map(jnp.copy, state)
    for number in range(30):
        state, _ = compiled.step(state, frozen, batch(number), np.int32(number), None)
    jax.tree.map(np.testing.assert_array_equal, state.average[1], before.stats)
    moved = state.average[0]["fc"]["kernel"] - before.trainable["fc"]["kernel"]
    whole = state.trainable["fc"]["kernel"] - before.trainable["fc"]["kernel"]
    assert 0 < np.linalg.norm(moved) < 0.1 * np.linalg.norm(whole)


@pytest.mark.slow
def test_skipped_step_changes_only_the_schedule():
    """The loss is finite; the gradients are not, because the anchor is NaN."""
    stage = late(
        schedule=CosineAnnealingLR(by="step"), ema=EMA, clip_norm=3.0, anchor=L2SP(), accumulate=2
    )
    compiled, state, frozen, start = start_of(stage, on_nonfinite="skip")
    state, record = compiled.step(state, frozen, batch(0), np.int32(0), start)
    assert record.finite
    assert record.metrics.examples == 8
    before, nan = jax.device_get(state), jax.tree.map(lambda x: x * jnp.nan, start)
    state, record = compiled.step(state, frozen, batch(1), np.int32(1), nan)
    assert not any(np.any(x) for x in jax.tree.leaves(record))
    after = jax.device_get(state)
    for group in ("fc", "layer3"):
        old, new = (s.opt_state.inner_states[group].inner_state for s in (before, after))
        assert (old.position, new.position) == (1, 2)
    held = after._replace(opt_state=before.opt_state)
    jax.tree.map(np.testing.assert_array_equal, held, before)
    rules = [
        {g: x.inner_state.rule for g, x in s.opt_state.inner_states.items() if g != "frozen"}
        for s in (before, after)
    ]
    jax.tree.map(np.testing.assert_array_equal, *rules)
    state, record = compiled.step(state, frozen, batch(2), np.int32(2), start)
    assert record.finite


@pytest.mark.slow
@pytest.mark.parametrize(("options", "dtype"), [({}, "uint8"), ({"mixup": 0.2}, "float32")])
def test_accumulate_divides_images_before_they_are_normalised(options, dtype, monkeypatch):
    """On several devices a quarter of the bytes travels; mixed images are normalised already."""
    divided, stack_parts = [], Devices.stack_parts

    def recorded(devices, rows, count, size, *, pad):
        divided.append((rows.shape, str(rows.dtype), count, size))
        return stack_parts(devices, rows, count, size, pad=pad)

    monkeypatch.setattr(Devices, "stack_parts", recorded)
    start_of(late(accumulate=2, **options))
    assert divided[0] == ((8, 16, 16, 3), dtype, 2, 4)


@pytest.mark.slow
def test_step_options_add_no_frozen_backward_pass():
    everything = {
        "clip_norm": 1.0, "ema": 0.9, "anchor": L2SP(), "class_weights": WEIGHTS,
        "label_smoothing": 0.1,
    }  # fmt: skip
    head = start_of(Stage("x", {"fc": 0.1}, steps=9, **everything), on_nonfinite="skip")[0].flops
    forward = eval_step(MODEL, Preprocessing(image_size=16))
    least = flops(forward.lower(*MODEL.init(jax.random.key(0)), batch(0)).compile())
    assert least < head < 1.03 * least
