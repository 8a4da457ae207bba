"""LoRA training against recordings of a hand-written one in torch, in float64.

Ten steps train the adapters of a convolution and a dense layer and a new head; then the adapters
are merged, and ten steps train the whole network.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxft
from jaxft import SGD, Adam, AdamW, Stage

GOLDEN = Path(__file__).parent / "golden" / "lora.npz"
STEPS = 10
RANKS = {"conv": 2, "body": 3}
CASES = {  # name: optimizer, alpha
    "sgd": (SGD(momentum=0.9), None),
    "sgd, alpha": (SGD(momentum=0.9), 8.0),
    "sgd, decay": (SGD(momentum=0.9, weight_decay=0.1), 4.0),
    "adam": (Adam(), None),
    "adam, alpha": (Adam(), 8.0),
    "adam, decay": (Adam(weight_decay=0.1), 4.0),
    "adamw": (AdamW(weight_decay=0.3), 4.0),
}
STAGES = (
    Stage("adapters", {"net.head": 0.05, "lora": 0.02}, steps=STEPS),
    Stage("all", {"*": 0.01}, steps=STEPS, merge_lora=True),
)


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape) / 3


def start():
    """Parameters and adapters, in jaxft's order of axes; `lora_b` is zero."""
    net = {
        "conv": {"kernel": drawn(0, 3, 3, 2, 4), "bias": drawn(1, 4)},
        "body": {"kernel": drawn(2, 4, 5), "bias": drawn(3, 5)},
        "head": {"kernel": drawn(4, 5, 3), "bias": drawn(5, 3)},
    }
    lora = {
        "conv.kernel": {"lora_a": drawn(6, 3, 3, 2, 2), "lora_b": np.zeros((2, 4))},
        "body.kernel": {"lora_a": drawn(7, 4, 3), "lora_b": np.zeros((3, 5))},
    }
    return {"net": net, "lora": lora}


def batch(step):
    """Images [b h w c] and targets [b k]."""
    return drawn(100 + step, 4, 6, 6, 2), drawn(200 + step, 4, 3)


def loss(net, x, y):
    numbers = ("NHWC", "HWIO", "NHWC")
    conv, body, head = (net[name] for name in ("conv", "body", "head"))
    x = jax.lax.conv_general_dilated(
        x, conv["kernel"], (2, 2), [(1, 1), (1, 1)], dimension_numbers=numbers
    )
    x = jnp.tanh(x + conv["bias"]).mean((1, 2))
    x = jnp.tanh(x @ body["kernel"] + body["bias"])
    return jnp.mean((x @ head["kernel"] + head["bias"] - y) ** 2)


def row(tree, losses):
    """The arrays at the end of a stage, then the losses of its steps."""
    return np.hstack([*map(np.ravel, jax.tree.leaves(tree)), losses])


def train(case):
    """Returns the row of each stage and its parameters."""
    rule, alpha = CASES[case]
    params, rows = jax.tree.map(jnp.asarray, start()), []
    for plan in jaxft.plan(STAGES, params):
        if plan.stage.merge_lora:
            merged = jaxft.merge_lora(params["net"], params["lora"], alpha=alpha)
            lora = {
                path: {**adapter, "lora_b": jnp.zeros_like(adapter["lora_b"])}
                for path, adapter in params["lora"].items()
            }
            params = {"net": merged, "lora": lora}
        transform = plan.transform(rule)
        state = transform.init(params)
        trainable, frozen = jaxft.partition(params, plan.labels)

        @jax.jit
        def step(trainable, frozen, state, x, y, transform=transform):
            def objective(half):
                tree = jaxft.combine(half, frozen)
                return loss(jaxft.merge_lora(tree["net"], tree["lora"], alpha=alpha), x, y)

            value, grads = jax.value_and_grad(objective)(trainable)
            updates, state = transform.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        losses = []
        for i in range(STEPS):
            x, y = batch(len(rows) * STEPS + i)
            trainable, state, value = step(trainable, frozen, state, x, y)
            losses.append(value)
        params = jaxft.combine(trainable, frozen)
        rows.append((row(params, losses), params))
    return rows


@pytest.mark.parametrize("case", CASES)
def test_lora_trajectory_equals_torch(case, golden):
    with jax.enable_x64(True):
        rows = [recorded for recorded, _ in train(case)]
    np.testing.assert_allclose(np.stack(rows), golden[case], rtol=1e-9, atol=1e-12)


def test_lora_training_leaves_kernels_bit_identical():
    with jax.enable_x64(True):
        (_, adapted), (_, merged) = train("adamw")
        before = jax.tree.map(jnp.asarray, start())
    for layer in ("conv", "body"):
        for name, array in before["net"][layer].items():
            assert np.array_equal(adapted["net"][layer][name], array)
            assert not np.array_equal(merged["net"][layer][name], array)
    for path, adapter in merged["lora"].items():  # frozen once they are merged
        assert np.array_equal(adapter["lora_a"], adapted["lora"][path]["lora_a"])
        assert not adapter["lora_b"].any()


@pytest.mark.slow
def test_lora_recording_equals_torch(golden):
    pytest.importorskip("torch")
    from record_lora import record

    for case in CASES:
        np.testing.assert_allclose(record(case), golden[case], rtol=1e-9, atol=1e-12, err_msg=case)
