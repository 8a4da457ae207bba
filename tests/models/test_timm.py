"""Networks against timm's: recorded results always, timm itself if it is installed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import record_golden
import record_timm
from record_timm import GOLDEN, NUM_CLASSES
from timm_cases import CASES, SMOKE

from jaxft import weights
from jaxft.models import create
from jaxft.weights.key_maps import torch_tensors

SINGLE, DOUBLE = 1e-5, 1e-9  # relative to the largest value of an array


def network(case, side):
    sized = {"image_size": side} if case.is_sized else {}
    return create(case.name, num_classes=NUM_CLASSES, **case.options | sized)


def tensors(model):
    return torch_tensors(*jax.eval_shape(model.init, jax.random.key(0)))


def trees(case, side, dtype):
    """Returns the seeded weights, resized to images of a size, as `(model, params, stats)`."""
    targets = jax.tree.leaves(tensors(network(case, case.sides[0])))
    seeded = record_golden.weights({t.name: t.shape for t in targets})
    model = network(case, side)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # remarks on resized tensors
        params, stats = weights.from_state_dict(seeded, model)
    return model, *jax.tree.map(lambda x: jnp.asarray(x, dtype), (params, stats))


def batch(side, dtype):
    return jnp.asarray(record_golden.images(side).transpose(0, 2, 3, 1), dtype)


def logits(case, side, dtype):
    model, params, stats = trees(case, side, dtype)
    run = jax.jit(partial(model.apply, norms="running"))
    return np.asarray(run(params, stats, batch(side, dtype))[0])


def by_name(model, params, stats):
    """Returns the arrays in torch's layouts, by torch's names."""
    targets = jax.tree.leaves(torch_tensors(params, stats))
    arrays = jax.tree.leaves((params, stats))
    return {t.name: t.to_torch(x) for t, x in zip(targets, arrays, strict=True)}


def train(case):
    """Takes the training steps of `record_timm.record`."""
    model, params, stats = trees(case, case.train_side, jnp.float64)
    images = batch(case.train_side, jnp.float64)
    tx = optax.sgd(record_timm.LR, momentum=0.9)

    def loss_of(params, stats):
        logits, stats = model.apply(params, stats, images, norms="batch", key=None)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, record_timm.TARGETS)
        return losses.mean(), stats

    @jax.jit
    def step(params, stats, opt_state):
        (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(params, stats)
        updates, opt_state = tx.update(gradients, opt_state)
        return loss, gradients, optax.apply_updates(params, updates), stats, opt_state

    opt_state, losses, first = tx.init(params), [], None
    for _ in range(record_timm.STEPS):
        loss, gradients, params, stats, opt_state = step(params, stats, opt_state)
        first = gradients if first is None else first
        losses.append(loss)
    return {
        "losses": np.array(losses),
        "gradients": record_timm.digest(by_name(model, first, {})),
        "trained": record_timm.digest(by_name(model, params, stats)),
    }


def assert_close(actual, expected, tolerance, message):
    atol = tolerance * np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol, err_msg=message)


def check(case, recorded):
    """Compares jaxft's results with those of timm."""
    for side in case.sides:
        expected = recorded[f"logits_{side}"]
        assert_close(logits(case, side, jnp.float32), expected, SINGLE, f"float32, {side} px")
    with jax.enable_x64(True):
        for side in case.sides:
            expected = recorded[f"logits_{side}"]
            assert_close(logits(case, side, jnp.float64), expected, DOUBLE, f"float64, {side} px")
        for name, value in train(case).items() if case.train_side else ():
            assert_close(value, recorded[name], DOUBLE, name)


@pytest.mark.parametrize("name", CASES)
def test_tensors_have_timms_names_and_shapes(name):
    case = CASES[name]
    shapes = {t.name: t.shape for t in jax.tree.leaves(tensors(network(case, case.sides[0])))}
    with np.load(GOLDEN / f"{name}.npz") as recorded:
        assert record_golden.listing(shapes) == str(recorded["tensors"].item(), "ascii")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.smoke] * (n in SMOKE)) for n in CASES]
)
def test_logits_gradients_and_training_equal_timms(name):
    with np.load(GOLDEN / f"{name}.npz") as recorded:
        check(CASES[name], recorded)


@pytest.mark.slow
@pytest.mark.skipif(not record_timm.timm_is_here(), reason="needs the torch extra")
@pytest.mark.parametrize("name", CASES)
def test_recorded_results_are_timms(name):
    live = record_timm.record(CASES[name])
    with np.load(GOLDEN / f"{name}.npz") as recorded:
        assert live.keys() == {*recorded}
        assert live.pop("tensors").item() == recorded["tensors"].item()
        for key, value in live.items():
            assert_close(value, recorded[key], 1e-10, key)


@pytest.mark.slow
@pytest.mark.skipif(not record_timm.timm_is_here(), reason="needs the torch extra")
@pytest.mark.parametrize("name", CASES)
def test_saved_weights_load_strictly_in_timm_bit_for_bit(name, tmp_path):
    import torch
    from safetensors.torch import load_file

    case = CASES[name]
    model, params, stats = trees(case, case.sides[0], jnp.float32)
    weights.save(tmp_path / "w.safetensors", model, params, stats)
    module = record_timm.build(case, case.sides[0], torch.float32)
    before = {n: x.clone() for n, x in module.state_dict().items()}
    saved = load_file(tmp_path / "w.safetensors")
    counters = {n: x for n, x in before.items() if not record_timm.is_weight(n)}
    module.load_state_dict(saved | counters, strict=True)
    assert all(torch.equal(before[name], x) for name, x in module.state_dict().items())
