"""Clipping, accumulation and finite checks, and their FLOPs with frozen layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import SGD, Adam, Stage, models
from jaxft.labels import leaf_labels
from jaxft.optim import gradients


@pytest.mark.parametrize(
    ("max_norm", "factor"), [(1.0, 1.0 / (5 + 1e-6)), (5.0, 5 / (5 + 1e-6)), (6.0, 1)]
)
def test_clip_equals_torch(max_norm, factor):
    with jax.enable_x64(True):
        tree = {"a": jnp.array([3.0, 0.0]), "b": jnp.array([[4.0]]), "frozen": None}
        clipped, norm = gradients.clip(tree, max_norm)
        assert float(norm) == 5.0
        np.testing.assert_allclose(clipped["a"], np.array([3.0, 0.0]) * factor, rtol=1e-15)
        assert clipped["frozen"] is None


def test_clip_value_equals_torch():
    tree = {"a": jnp.array([3.0, -0.2, jnp.nan]), "b": jnp.array([[-4.0]], jnp.bfloat16)}
    clipped = gradients.clip_value(tree | {"frozen": None}, 0.5)
    np.testing.assert_array_equal(clipped["a"], np.array([0.5, -0.2, np.nan], np.float32))
    assert (clipped["b"].dtype, float(clipped["b"][0, 0])) == (jnp.bfloat16, -0.5)
    assert clipped["frozen"] is None


def test_accumulate_is_the_mean_over_batches():
    def loss(w, x):
        return jnp.mean((x @ w) ** 2)

    x, w = jnp.arange(24.0).reshape(4, 2, 3), jnp.ones(3)
    value, gradient = gradients.accumulate(lambda batch: jax.value_and_grad(loss)(w, batch), x)
    whole, whole_gradient = jax.value_and_grad(loss)(w, x.reshape(8, 3))
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    np.testing.assert_allclose(gradient, whole_gradient, rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_if_finite_skips_a_step_with_a_bad_gradient(bad):
    new, old = {"w": jnp.ones(2)}, {"w": jnp.zeros(2)}
    kept, finite = gradients.if_finite({"a": jnp.array([0.0, bad]), "b": None}, new, old)
    assert not finite
    np.testing.assert_array_equal(kept["w"], 0)
    kept, finite = gradients.if_finite({"a": jnp.zeros(2)}, new, old)
    assert finite
    np.testing.assert_array_equal(kept["w"], 1)


def test_if_finite_without_gradients():
    assert gradients.if_finite({"a": None}, 1.0, 0.0)[1]


MODEL = models.create("resnet18", num_classes=10)
STAGES = [
    Stage("head", {"fc": 0.1}, 1),
    Stage("late", {"fc": 0.1, "layer4": 0.01}, 1),
    Stage("later", {"fc": 0.1, "layer4": 0.01, "layer3": 0.01}, 1),
    Stage("all", {"*": 0.001}, 1),
]


def step_flops(stage, *, with_readers):
    """Returns the FLOPs of a step, with or without functions that read all gradients.

    Both count one micro-batch: XLA counts the body of a scan once.
    """
    params, stats = jax.eval_shape(MODEL.init, jax.random.key(0))
    plan = jaxft.plan(STAGES, params)[stage]
    transform = plan.transform(SGD(momentum=0.9))

    def step(params, stats, opt_state, average, batches):
        trainable, frozen = jaxft.partition(params, plan.labels)

        def loss(trainable, images):
            whole = jaxft.combine(trainable, frozen)
            logits, _ = MODEL.apply(whole, stats, images, norms="running")
            return jnp.mean(logits**2)

        def value_and_grad(images):
            return jax.value_and_grad(loss)(trainable, images)

        if not with_readers:
            _, grads = value_and_grad(batches[0])
            updates, opt_state = transform.update(grads, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state
        _, grads = gradients.accumulate(value_and_grad, batches)
        grads, norm = gradients.clip(grads, 1.0)
        updates, new_state = transform.update(grads, opt_state, trainable)
        new = optax.apply_updates(trainable, updates)
        (new, new_state), finite = gradients.if_finite(
            grads, (new, new_state), (trainable, opt_state)
        )
        average, _ = jaxft.partition(average, plan.labels)
        return new, new_state, optax.incremental_update(new, average, 0.01), norm, finite

    opt_state = jax.eval_shape(transform.init, params)
    batches = jax.ShapeDtypeStruct((2, 16, 224, 224, 3), jnp.float32)
    lowered = jax.jit(step).lower(params, stats, opt_state, params, batches)
    return lowered.compile().cost_analysis()["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", range(4), ids=[stage.name for stage in STAGES])
def test_gradient_readers_do_not_restore_the_frozen_backward_pass(stage):
    plain, full = (step_flops(stage, with_readers=with_readers) for with_readers in (False, True))
    assert full < 1.02 * plain


@pytest.mark.slow
def test_freezing_saves_flops():
    head, late, later, whole = (step_flops(stage, with_readers=False) for stage in range(4))
    assert head < 0.8 * late < 0.8 * later < 0.8 * whole


@pytest.mark.parametrize(("optimizer", "moments"), [(SGD(momentum=0.9), 1), (Adam(), 2)], ids=repr)
def test_optimizer_state_covers_trainable_parameters_only(optimizer, moments):
    params, _ = jax.eval_shape(MODEL.init, jax.random.key(0))
    for plan in jaxft.plan(STAGES, params):
        state = jax.eval_shape(plan.transform(optimizer).init, params)
        labels = leaf_labels(params, plan.labels)
        trained = sum(
            leaf.size
            for leaf, name in zip(jax.tree.leaves(params), labels, strict=True)
            if name != "frozen"
        )
        assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == moments * trained
