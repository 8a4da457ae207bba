"""Optimizers against torch's formulas; multi_transform."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import SGD, Adagrad, Adam, AdamW, Lion, NAdam, RAdam, RMSprop, Stage
from jaxft.optim.schedule_base import Span
from jaxft.optim.schedules import Constant
from jaxft.optim.transform import group_transform

RATE, STEPS = 0.1, 6


def with_lr(optimizer, rate):
    return group_transform(optimizer, rate, Constant(), Span(STEPS, 1, STEPS))


def gradient(step):
    return np.cos(np.arange(4) + 0.7 * step)


def torch_sgd(p, *, momentum=0.0, nesterov=False, weight_decay=0.0):
    buffer = None
    for step in range(STEPS):
        g = gradient(step) + weight_decay * p
        buffer = g if buffer is None else momentum * buffer + g
        p = p - RATE * (g + momentum * buffer if nesterov else buffer)
    return p


def torch_adam(p, *, b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False):
    m = v = 0.0
    for step in range(STEPS):
        if decoupled:
            p = p * (1 - RATE * weight_decay)
        g = gradient(step) + (0.0 if decoupled else weight_decay * p)
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        m_hat, v_hat = m / (1 - b1 ** (step + 1)), v / (1 - b2 ** (step + 1))
        p = p - RATE * m_hat / (np.sqrt(v_hat) + eps)
    return p


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        (SGD(), lambda p: torch_sgd(p)),
        (SGD(momentum=0.9), lambda p: torch_sgd(p, momentum=0.9)),
        (SGD(momentum=0.9, nesterov=True), lambda p: torch_sgd(p, momentum=0.9, nesterov=True)),
        (SGD(weight_decay=0.1), lambda p: torch_sgd(p, weight_decay=0.1)),
        (Adam(), lambda p: torch_adam(p)),
        (Adam(b1=0.8, weight_decay=0.1), lambda p: torch_adam(p, b1=0.8, weight_decay=0.1)),
        (AdamW(), lambda p: torch_adam(p, weight_decay=1e-2, decoupled=True)),
        (AdamW(weight_decay=0.3), lambda p: torch_adam(p, weight_decay=0.3, decoupled=True)),
    ],
    ids=lambda value: repr(value) if isinstance(value, SGD | Adam | AdamW) else "",
)  # fmt: skip
def test_optimizers_equal_torchs_formulas(optimizer, reference):
    start = np.linspace(-1, 1, 4)
    with jax.enable_x64(True):
        transform, params = with_lr(optimizer, RATE), jnp.asarray(start)
        state = transform.init(params)
        for step in range(STEPS):
            updates, state = transform.update(jnp.asarray(gradient(step)), state, params)
            params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, reference(start), rtol=1e-12)


def test_optax_optimizer_uses_the_learning_rates_of_the_stage():
    plan = jaxft.plan([Stage("all", {"*": 1e-2}, 1, optimizer=optax.scale_by_lion())], PARAMS)[0]
    results = []
    for transform in (plan.transform(), optax.lion(1e-2, weight_decay=0.0)):
        state, params = transform.init(PARAMS), PARAMS
        for step in range(3):
            gradients = jax.tree.map(lambda p: jnp.sin(p + step), PARAMS)  # noqa: B023
            updates, state = transform.update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        results.append(params)
    jax.tree.map(np.testing.assert_array_equal, *results)


PARAMS = {"body": {"kernel": jnp.arange(3.0)}, "head": {"kernel": jnp.arange(2.0)}}


def test_multi_transform_accepts_full_and_trainable_gradients():
    labels = jaxft.label(PARAMS, {"head": "x"})
    transform = jaxft.multi_transform({"x": optax.sgd(0.5)}, labels)
    state = transform.init(PARAMS)
    full = jax.tree.map(jnp.ones_like, PARAMS)
    updates, _ = transform.update(full, state, PARAMS)
    np.testing.assert_array_equal(updates["body"]["kernel"], 0)
    half, _ = jaxft.partition(full, labels)
    trainable, _ = jaxft.partition(PARAMS, labels)
    halved, _ = transform.update(half, state, trainable)
    assert halved["body"]["kernel"] is None
    np.testing.assert_array_equal(halved["head"]["kernel"], updates["head"]["kernel"])


def test_multi_transform_does_not_call_a_callable_label_tree():
    @jax.tree_util.register_pytree_node_class
    class Module:
        def __init__(self, kernel):
            self.kernel = kernel

        def __call__(self):
            raise AssertionError("a label tree is no function")

        def tree_flatten(self):
            return (self.kernel,), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(*children)

    module = Module(jnp.ones(2))
    transform = jaxft.multi_transform({"x": optax.sgd(1.0)}, jaxft.label(module, {"*": "x"}))
    updates, _ = transform.update(module, transform.init(module), module)
    np.testing.assert_array_equal(updates.kernel, -1)


def test_frozen_groups_hold_no_state():
    plans = jaxft.plan([Stage("head", {"head": 0.1}, 1), Stage("all", {"*": 0.1}, 1)], PARAMS)
    for optimizer, moments in ((SGD(), 0), (SGD(momentum=0.9), 1), (Adam(), 2), (RMSprop(), 1)):
        sizes = []
        for plan in plans:
            state = plan.transform(optimizer).init(PARAMS)
            leaves = [leaf for g in plan.lr for leaf in jax.tree.leaves(rule_of(state, g))]
            sizes.append(sum(leaf.size for leaf in leaves if leaf.ndim))
        assert sizes == [2 * moments, 5 * moments]


def rule_of(state, group):
    return state.inner_states[group].inner_state.rule


@pytest.mark.parametrize(
    "optimizer",
    [Adam(amsgrad=True), NAdam(), RAdam(b2=0.6), RAdam(), Adagrad(), Lion()],
    ids=lambda optimizer: optimizer.rule,
)
def test_optimizer_keeps_dtypes_and_descends(optimizer):
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((2, 2), jnp.float32)}
    tx = with_lr(optimizer, RATE)
    state, start = tx.init(params), params
    for _ in range(STEPS):
        updates, new = tx.update(params, state, params)  # the gradient of half the squared norm
        assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
        assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, params)
        params, state = optax.apply_updates(params, updates), new
    assert optax.tree.norm(params) < 0.8 * optax.tree.norm(start)
