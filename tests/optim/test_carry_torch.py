"""`carry` through wrappers of optax against torch's `add_param_group`, in float64.

Three stages of twenty steps, each with more layers and lower learning rates. Muon is recorded with
torch's iteration in float64 instead of bfloat16, and without Nesterov momentum, of which optax
corrects the bias and torch does not.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft

GOLDEN = Path(__file__).parents[1] / "golden" / "carry.npz"
STEPS, MAX_NORM, MINI_STEPS, DECAY = 20, 0.7, 3, 0.3
STAGES = (
    {"head": 0.1},
    {"head": 0.05, "late": 0.02},
    {"head": 0.02, "late": 0.01, "body": 0.005},
)
SHAPES = {
    "body": {"kernel": (3, 2), "bias": (2,)},
    "late": {"kernel": (2, 2), "bias": (2,)},
    "head": {"kernel": (2, 4), "bias": (4,)},
}


def start():
    rng = np.random.default_rng(0)
    return {
        layer: {name: rng.normal(size=shape) for name, shape in shapes.items()}
        for layer, shapes in SHAPES.items()
    }


def gradient(p, step):
    return np.cos(3 * p + 0.7 * step)


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def adam(learning_rate):
    return optax.adam(learning_rate)


def injected(learning_rate):
    return optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)


def decayed(learning_rate):
    return optax.adamw(learning_rate, weight_decay=DECAY, mask=is_matrix)


def muon(learning_rate):
    return optax.contrib.muon(learning_rate, eps=0.0, nesterov=False)


def clipped(tx):
    return optax.chain(optax.clip_by_global_norm(MAX_NORM), tx)


def accumulated(tx):
    return optax.MultiSteps(tx, MINI_STEPS, accumulator_dtype=jnp.float64)


# Within each label, and around the labels.
CASES = {
    "clip_by_global_norm": (adam, clipped),
    "MultiSteps": (adam, accumulated),
    "inject_hyperparams": (injected, lambda tx: tx),
    "adamw without decay of biases": (decayed, lambda tx: tx),
    "muon": (muon, lambda tx: tx),
    "all": (decayed, lambda tx: accumulated(clipped(tx))),
}


def train(case):
    """Returns the parameters at the end of each stage, as rows."""
    within, around = CASES[case]
    params, state, rows = jax.tree.map(jnp.asarray, start()), None, []
    for stage, rates in enumerate(STAGES):
        labels = jaxft.label(params, {layer: layer for layer in rates})
        tx = {layer: within(rate) for layer, rate in rates.items()}
        tx = jaxft.trainable_only(around(jaxft.multi_transform(tx, labels)), labels)
        fresh = tx.init(params)
        state = jaxft.carry(state, fresh, report=True)[0] if stage else fresh
        trainable, frozen = jaxft.partition(params, labels)
        update = jax.jit(tx.update)
        for step in range(stage * STEPS, (stage + 1) * STEPS):
            gradients = jax.tree.map(lambda p: jnp.cos(3 * p + 0.7 * step), trainable)  # noqa: B023
            updates, state = update(gradients, state, trainable)
            trainable = optax.apply_updates(trainable, updates)
        params = jaxft.combine(trainable, frozen)
        rows.append(np.hstack([np.ravel(p) for p in jax.tree.leaves(params)]))
    return np.stack(rows)


@pytest.mark.parametrize("case", CASES)
def test_carry_through_wrappers_equals_recorded_torch(case):
    with jax.enable_x64(True), np.load(GOLDEN) as golden:
        np.testing.assert_allclose(train(case), golden[case], rtol=0, atol=1e-10)


def test_recorded_carry_is_that_of_torch():
    pytest.importorskip("torch")
    from record_carry import record

    with np.load(GOLDEN) as golden:
        for case in CASES:
            np.testing.assert_allclose(record(case), golden[case], rtol=0, atol=1e-12)
