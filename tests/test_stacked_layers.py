"""Layers of `nn.scan` and `nnx.vmap` train one by one, exactly as in the unrolled network."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxft
from jaxft import AdamW, LabelError, PatternError, Stage, strategies

DEPTH, WIDTH = 4, 8


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        h = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(h, h)
        h = nn.gelu(nn.Dense(2 * WIDTH, name="fc1")(nn.LayerNorm(name="norm2")(x)))
        return x + nn.Dense(WIDTH, name="fc2")(h), None


class ViT(nn.Module):
    scan: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (4, 4), strides=4, name="patch_embed")(x).reshape(x.shape[0], -1, WIDTH)
        x = x + self.param("pos_embed", nn.initializers.normal(0.02), (1, *x.shape[1:]))
        if self.scan:
            split = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
            x, _ = nn.scan(Block, length=DEPTH, **split)(name="blocks")(x, None)
        else:
            for i in range(DEPTH):
                x, _ = Block(name=f"blocks_{i}")(x)
        return nn.Dense(3, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


IMAGES = np.random.default_rng(0).standard_normal((6, 8, 8, 3))
TARGETS = np.arange(6) % 3
PARAMS = jax.tree.map(
    lambda x: np.asarray(x, np.float64), ViT(True).init(jax.random.key(0), IMAGES)["params"]
)


def loss_of(scan):
    def loss(params):
        logits = ViT(scan).apply({"params": params}, IMAGES)
        return optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS).mean()

    return loss


def unrolled(params):
    """Returns the parameters of the unrolled network."""
    blocks = {
        f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(DEPTH)
    }
    return {name: x for name, x in params.items() if name != "blocks"} | blocks


# The gradient of a key's bias is zero but for rounding, which Adam divides by eps.
OPTIMIZER = AdamW(decay_vectors=False, weight_decay=0.1, eps=1e-6)


def train(stages, params, loss, steps=3):
    """Trains all stages with AdamW, carrying its state; returns the parameters after each."""
    after, opt_state = [], None
    for k, plan in enumerate(jaxft.plan(stages, params)):
        tx = plan.transform(OPTIMIZER, steps_per_epoch=steps)
        fresh = tx.init(params)
        opt_state = jaxft.carry(opt_state, fresh, park=plan.park) if k else fresh
        trainable, frozen = jaxft.partition(params, plan.labels)

        @jax.jit
        def step(trainable, opt_state, frozen, tx=tx):
            grads = jax.grad(lambda half: loss(jaxft.combine(half, frozen)))(trainable)
            updates, opt_state = tx.update(grads, opt_state, trainable)
            return optax.apply_updates(trainable, updates), opt_state

        for _ in range(steps * plan.stage.epochs):
            trainable, opt_state = step(trainable, opt_state, frozen)
        params = jaxft.combine(trainable, frozen)
        after.append(params)
    return after


def stages_of(name, layers):
    blocks = [("patch_embed", "pos_embed"), *layers, ("norm", "head")]
    if name == "layer_decay":
        return strategies.layer_decay(blocks, 1e-3, 0.7, epochs=1)
    return strategies.gradual_unfreeze(blocks[-4:], 1e-3, epochs=1)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layer_decay", "gradual_unfreeze"])
def test_scanned_vit_trains_as_the_unrolled_one(name):
    with jax.enable_x64(True):
        layers = jaxft.unstack(PARAMS, "blocks")
        scan = train(
            stages_of(name, [f"blocks.{i}" for i in range(DEPTH)]),
            layers,
            lambda layers: loss_of(True)(jaxft.stack(layers)),
        )
        loop = train(
            stages_of(name, [f"blocks_{i}" for i in range(DEPTH)]), unrolled(PARAMS), loss_of(False)
        )
        assert len(scan) == len(loop) == (1 if name == "layer_decay" else 4)
        for a, b in zip(scan, loop, strict=True):
            a = unrolled(jaxft.stack(a))
            jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12), a, b)
        moved = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), a, unrolled(PARAMS))
        assert min(jax.tree.leaves(moved["blocks_3"]["fc1"])) > 1e-3
        if name == "gradual_unfreeze":
            first, last = (jaxft.stack(params) for params in (scan[0], scan[-1]))
            for stacked, end in ((first, 4), (last, 1)):  # bit-identical
                old, new = (jax.tree.leaves(tree["blocks"]) for tree in (PARAMS, stacked))
                assert all(
                    x[:end].tobytes() == np.asarray(y)[:end].tobytes()
                    for x, y in zip(old, new, strict=True)
                )


@pytest.mark.slow
def test_frozen_layers_of_a_scan_are_bit_identical_and_have_no_optimizer_state():
    params = jax.tree.map(jnp.float32, PARAMS)
    layers = jaxft.unstack(params, "blocks")
    labels = jaxft.label(layers, {"blocks[2:]": "late", "head": "head"})
    transforms = {"late": optax.adam(1e-2), "head": optax.adam(1e-1)}
    tx = jaxft.multi_transform(transforms, labels)
    trainable, frozen = jaxft.partition(layers, labels)
    opt_state = tx.init(layers)
    assert len(jax.tree.leaves(opt_state.inner_states["late"].inner_state[0].mu)) == 2 * 16

    def loss(half):
        return loss_of(True)(jaxft.stack(jaxft.combine(half, frozen)))

    updates, _ = tx.update(jax.jit(jax.grad(loss))(trainable), opt_state, trainable)
    after = jaxft.stack(jaxft.combine(optax.apply_updates(trainable, updates), frozen))
    assert jax.tree.structure(after) == jax.tree.structure(params)
    moved = [
        [float(jnp.abs(x[i] - y[i]).max()) for i in range(DEPTH)]
        for x, y in zip(*(jax.tree.leaves(tree["blocks"]) for tree in (params, after)), strict=True)
    ]
    for change in moved:
        assert change[:2] == [0, 0]
        assert min(change[2:]) > 0


@pytest.mark.parametrize(("pattern", "scans"), [("head", 1), ("blocks.3", 2), ("patch_embed", 2)])
def test_scan_runs_backward_only_if_a_layer_or_a_parameter_before_it_trains(pattern, scans):
    layers = jaxft.unstack(PARAMS, "blocks")
    trainable, frozen = jaxft.partition(layers, jaxft.label(layers, {pattern: "x"}))

    def loss(half):
        return loss_of(True)(jaxft.stack(jaxft.combine(half, frozen)))

    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(trainable))
    assert len(re.findall(r"\bscan\[", jaxpr)) == scans


@pytest.mark.parametrize("view", [lambda tree: tree, lambda tree: jaxft.unstack(tree, "blocks")])
def test_decay_vectors_leaves_out_stacked_norms_and_biases(view):
    params = {
        "blocks": {"norm": {"scale": jnp.ones((4, 8))}, "fc": {"kernel": jnp.ones((4, 8, 8))}},
        "norm": {"scale": jnp.ones(8)},
    }
    layers = view(params)
    (plan,) = jaxft.plan(Stage("all", {"*": 1.0}, 1), layers)
    tx = plan.transform(AdamW(weight_decay=0.5, decay_vectors=False))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, layers), tx.init(layers), layers)
    updates = jaxft.stack(updates)
    np.testing.assert_array_equal(updates["blocks"]["norm"]["scale"], 0)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0)
    np.testing.assert_array_equal(updates["blocks"]["fc"]["kernel"], -0.5)


class Layer(nnx.Module):
    def __init__(self, rngs):
        self.fc = nnx.Linear(2, 2, rngs=rngs)


def stacked_module():
    """Returns an NNX module with three stacked layers."""
    make = nnx.vmap(Layer, in_axes=(0,), out_axes=0)
    layers = make(nnx.Rngs(0).split(3))
    return nnx.Dict(blocks=layers, head=nnx.Linear(2, 2, rngs=nnx.Rngs(1)))


def test_unstack_and_stack_of_an_nnx_state_and_its_shapes():
    graph, state = nnx.split(stacked_module(), nnx.Param)
    layers = jaxft.unstack(state, "blocks")
    names = {f"blocks.{i}.fc.{leaf}" for i in range(3) for leaf in ("bias", "kernel")}
    assert set(jaxft.paths(layers)) == names | {"head.bias", "head.kernel"}
    assert layers["blocks"]["fc"]["kernel"].get_value().layers[1].shape == (2, 2)
    joined = jaxft.stack(jaxft.combine(*jaxft.partition(layers, jaxft.label(layers, {"*.1": "x"}))))
    assert jax.tree.structure(joined) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, joined, state)
    assert nnx.merge(graph, joined).blocks.fc.kernel.shape == (3, 2, 2)
    shapes = jax.eval_shape(lambda: state)
    assert jax.tree.map(jnp.shape, jaxft.unstack(shapes, "blocks")) == jax.tree.map(
        jnp.shape, layers
    )
    restored = jaxft.stack(jaxft.unstack(shapes, "blocks"))
    assert jax.tree.map(jnp.shape, restored) == jax.tree.map(jnp.shape, shapes)


@pytest.mark.parametrize("module", [np, jnp])
def test_unstack_keeps_nesting_axes_and_other_leaves(module):
    array = module.arange(24.0).reshape(2, 3, 4)
    params = {"a": {"b": {"w": array, "f": jnp.tanh, "none": None}}, "c": array}
    for axis in range(3):
        layers = jaxft.unstack(params, "a.b", axis=axis)
        assert jaxft.paths(layers) == [
            "a.b.f",
            *(f"a.b.{i}.w" for i in range(array.shape[axis])),
            "c",
        ]
        slices = layers["a"]["b"]["w"].layers
        np.testing.assert_array_equal(slices[1], np.take(np.asarray(array), 1, axis))
        joined = jaxft.stack(layers)
        assert type(joined["a"]["b"]["w"]) is type(array)
        np.testing.assert_array_equal(joined["a"]["b"]["w"], array)
        assert joined["a"]["b"]["f"] is jnp.tanh
        assert joined["a"]["b"]["none"] is None
        assert joined["c"] is array


def test_unstack_of_stacks_within_stacks():
    params = {"stages": {"blocks": {"w": jnp.arange(6.0).reshape(2, 3)}}}
    layers = jaxft.unstack(jaxft.unstack(params, "stages"), "stages.*.blocks")
    expected = [f"stages.{i}.blocks.{j}.w" for i in range(2) for j in range(3)]
    assert jaxft.paths(layers) == expected
    jax.tree.map(np.testing.assert_array_equal, jaxft.stack(layers), params)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["block"], PatternError, "'block' matches no parameter.*Did you mean 'blocks'"),
        (["**.w"], PatternError, "no fixed depth"),
        (
            ["blocks"],
            LabelError,
            r"'blocks' has no common number.*axis 0: blocks.a \[2\], blocks.b",
        ),
        (["blocks", "scalar"], LabelError, r"blocks.*'scalar' has no common number.*scalar \[\]"),
    ],
    ids=str,
)
def test_unstack_rejects_other_trees(names, error, message):
    params = {"blocks": {"a": np.zeros(2), "b": np.zeros(3)}, "scalar": np.zeros(())}
    with pytest.raises(error, match=f"(?s)unstack: .*{message}"):
        jaxft.unstack(params, *names)


def test_stack_of_a_half_is_an_error():
    layers = jaxft.unstack({"blocks": {"w": np.zeros((3, 2))}, "head": np.zeros(1)}, "blocks")
    trainable, _ = jaxft.partition(layers, jaxft.label(layers, {"blocks.1": "x"}))
    with pytest.raises(LabelError, match=r"layers \[0, 2\] of blocks.w are None.*combine"):
        jaxft.stack(trainable)
    _, frozen = jaxft.partition(layers, jaxft.label(layers, {"blocks": "x"}))
    assert jaxft.stack(frozen)["blocks"] == {"w": None}
