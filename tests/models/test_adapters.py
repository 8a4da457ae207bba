"""Modules of the user's own, as networks: what they compute, and which statistics they use."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxft
from jaxft.models import NNX, Linen
from jaxft.models.nnx_trees import inside
from jaxft.train.norms import norm_modes

sys.path.insert(0, str(Path(__file__).parent))
from user_modules import Attention, Compact, Nested, Odd, Told, Viewed

SHAPE = (6, 6, 3)
KEY = jax.random.key(7)
IMAGES = 1 + 2 * jax.random.normal(jax.random.key(1), (4, *SHAPE))
# name: (the model, what its call is told when it trains and when not)
NETWORKS = {
    "compact": (Linen(Compact(), shape=SHAPE, head="head"), {"train": True}, {"train": False}),
    "odd": (Linen(Odd(), shape=SHAPE, head="head"), {"deterministic": False}, {}),
    "attention": (Linen(Attention(), shape=SHAPE, head="head"), {}, {}),
    "told": (NNX(Told, shape=SHAPE, head="fc"), {"training": True}, {"training": False}),
    "viewed": (NNX(Viewed, shape=SHAPE, head="head.out"), {}, {}),
}
NESTED = Linen(Nested(), shape=SHAPE, head="out")
MODELS = {name: model for name, (model, *_) in NETWORKS.items()} | {"nested": NESTED}
NORMED = {name: MODELS[name] for name in MODELS if name != "attention"}


def drawn(model):
    """Parameters and statistics that are no layer's first."""
    trees = model.init(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * (1 + jnp.arange(x.shape[-1], dtype=x.dtype)), trees)


def direct(model, params, stats, images, flags, trains):
    """The user's own call, in float32 logits, and the statistics after it."""
    if isinstance(model, Linen):
        rngs = {"dropout": KEY, "drop_path": jax.random.fold_in(KEY, 1)} if trains else {}
        logits, new = model.module.apply(
            {"params": params, "batch_stats": stats}, images, rngs=rngs, mutable=["batch_stats"],
            **flags,
        )  # fmt: skip
        return logits.astype(jnp.float32), new.get("batch_stats", {})
    graph, *states, streams = nnx.split(
        model.build(rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat, ...
    )
    pure = [
        inside(t, nnx.to_pure_dict(like)) for t, like in zip((params, stats), states, strict=True)
    ]
    module = nnx.merge(graph, *pure, streams)
    module.train() if trains else module.eval()
    return module(images, **flags), model.trees(module)[1]


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def paths_of(tree):
    return set(jaxft.paths(tree))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_it_computes_what_the_module_does(name):
    model, trains, rests = NETWORKS[name]
    params, stats = drawn(model)
    told = "running" if name == "odd" else "batch"  # its norm is always told so
    found = model.apply(params, stats, IMAGES, norms=told, key=KEY)
    assert_identical(found, direct(model, params, stats, IMAGES, trains, True))
    found = model.apply(params, stats, IMAGES, norms="running")
    assert_identical(found, direct(model, params, stats, IMAGES, rests, False))
    assert found[1] is stats
    assert found[0].dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compact", "told", "viewed"])
def test_gradients_are_the_modules(name):
    model, flags, _ = NETWORKS[name]
    params, stats = drawn(model)

    def gradients(call):
        return jax.grad(lambda params: jnp.square(call(params)[0]).mean())(params)

    found = gradients(lambda p: model.apply(p, stats, IMAGES, norms="batch", key=KEY))
    expected = gradients(lambda p: direct(model, p, stats, IMAGES, flags, True))
    assert all(leaf.any() for leaf in jax.tree.leaves(expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NORMED)
def test_each_norm_has_its_own_mode(name):
    model = NORMED[name]
    params, stats = drawn(model)
    apply = partial(model.apply, params, stats, IMAGES)
    layers = sorted(path.rpartition(".")[0] for path in paths_of(stats) if path.endswith(".mean"))
    assert len(layers) == {"compact": 2, "viewed": 2}.get(name, 1)
    outputs = {
        mode: {
            layer: apply(norms=dict.fromkeys(layers, "running") | {layer: mode}) for layer in layers
        }
        for mode in ("running", "batch", "batch_fixed")
    }
    for layer in layers:
        resting, moving, fixed = (outputs[mode][layer] for mode in outputs)
        assert resting[1] is fixed[1] is stats
        assert not np.array_equal(resting[0], moving[0])
        np.testing.assert_array_equal(moving[0], fixed[0])
        differs = jax.tree.map(lambda a, b: a is not b, stats, moving[1])
        flat = zip(jaxft.paths(stats), jax.tree.leaves(differs), strict=True)
        assert {path for path, other in flat if other} == {f"{layer}.mean", f"{layer}.var"}
    whole, mixed = (
        apply(norms=norms)
        for norms in ("batch", dict.fromkeys(layers, "batch_fixed") | {layers[0]: "batch"})
    )
    np.testing.assert_array_equal(mixed[0], whole[0])
    for path, mine, all_moved, old in zip(
        jaxft.paths(stats), *map(jax.tree.leaves, (mixed[1], whole[1], stats)), strict=True
    ):
        expected = all_moved if path.startswith(f"{layers[0]}.") else old
        np.testing.assert_array_equal(mine, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_padding_changes_nothing(name):
    model = MODELS[name]
    params, stats = drawn(model)
    norms = "batch" if stats else "running"
    logits, moved = model.apply(params, stats, IMAGES[:3], norms=norms)
    padded = IMAGES.at[3].set(1e3)
    mask = jnp.array([True, True, True, False])
    found, moved_too = jax.jit(partial(model.apply, norms=norms))(params, stats, padded, mask=mask)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=5e-3 if name == "odd" else 1e-4)
    close(found[:3], logits)
    jax.tree.map(close, moved_too, moved)


DROPPING = {
    "linen": lambda rate: Linen(Compact(dropout=rate), shape=SHAPE, head="head"),
    "always on": lambda rate: Linen(Nested(dropout=rate), shape=SHAPE, head="out"),
    "called": lambda rate: NNX(partial(Told, dropout=rate), shape=SHAPE, head="fc"),
    "viewed": lambda rate: NNX(partial(Viewed, dropout=rate), shape=SHAPE, head="head.out"),
}


@pytest.mark.parametrize("name", DROPPING)
def test_a_key_draws_what_is_dropped(name):
    model, undropped = DROPPING[name](0.5), DROPPING[name](0.0)
    params, stats = drawn(model)

    def logits(model, key=None):
        return np.asarray(model.apply(params, stats, IMAGES, norms="running", key=key)[0])

    np.testing.assert_array_equal(logits(model), logits(undropped))
    np.testing.assert_array_equal(logits(model, KEY), logits(model, KEY))
    keys = (None, KEY, jax.random.key(8))
    assert len({logits(model, key).tobytes() for key in keys}) == 3


def test_two_dropouts_draw_apart():
    class Two(nnx.Module):
        def __init__(self, *, rngs):
            self.drops = nnx.List([nnx.Dropout(0.5, rngs=rngs) for _ in range(2)])
            self.head = nnx.Linear(3, 64, rngs=rngs)

        def __call__(self, x):
            x = self.head(x.mean((1, 2)))
            return jnp.where(self.drops[0](x) == 0, 1.0, 0) + jnp.where(
                self.drops[1](x) == 0, 2.0, 0
            )

    model = NNX(Two, shape=SHAPE, head="head")
    both = model.apply(*model.init(KEY), IMAGES, norms="running", key=KEY)[0]
    assert {*np.unique(both)} == {0.0, 1.0, 2.0, 3.0}


@pytest.mark.parametrize("name", MODELS)
def test_patterns_and_modes_go_by_the_modules_own_paths(name):
    model = MODELS[name]
    params, stats = model.init(KEY)
    stages = [jaxft.Stage("h", {model.head: 1.0}, 1), jaxft.Stage("all", {"*": 1.0}, 1)]
    head, whole = jaxft.plan(stages, params)
    labels = zip(jaxft.paths(params), jax.tree.leaves(head.labels), strict=True)
    assert {path for path, name in labels if name != jaxft.FROZEN} == {
        f"{model.head}.bias", f"{model.head}.kernel",
    }  # fmt: skip
    assert "running" in {*norm_modes(params, stats, head.labels).values()} or not stats
    model.apply(params, stats, IMAGES, norms=norm_modes(params, stats, whole.labels))
    assert model.num_classes == 5


def test_paths():
    assert paths_of(MODELS["compact"].init(KEY)[0]) >= {"Conv_0.kernel", "BatchNorm_1.scale"}
    assert paths_of(NESTED.init(KEY)[1]) == {"block.bn.mean", "block.bn.var"}
    params, _ = MODELS["viewed"].init(KEY)
    assert paths_of(params) >= {"body.layers.0.kernel", "body.layers.1.scale", "head.out.bias"}
    assert all(isinstance(key, str) for key in params["body"]["layers"])
    variables = Compact().init(KEY, IMAGES, train=False)
    found = MODELS["compact"].init(KEY)
    assert_identical(found, (variables["params"], variables["batch_stats"]))


def test_equal_models_are_one_static_argument():
    for make in (
        lambda width: Linen(Compact(width), shape=[*SHAPE], head="head"),
        lambda width: NNX(Told if width else Viewed, shape=SHAPE, head="fc" if width else "head"),
    ):
        assert make(0.5) == make(0.5)
        assert hash(make(0.5)) == hash(make(0.5))
        assert make(0.5) != make(0.0)


def test_any_call_that_makes_logits():
    class Many(nn.Module):
        @nn.compact
        def __call__(self, x, mode):
            return {"logits": nn.Dense(2, name="out")(x.mean((1, 2))) * (2 if mode == "fit" else 1)}

    def call(module, images, trains):
        return module(images[..., :1], mode="fit" if trains else "rest")["logits"]

    model = Linen(Many(), shape=SHAPE, head="out", call=call)
    params, stats = model.init(KEY)
    assert params["out"]["kernel"].shape == (1, 2)
    once, twice = (
        model.apply(params, stats, IMAGES, norms="running", key=k)[0] for k in (None, KEY)
    )
    np.testing.assert_array_equal(2 * once, twice)
