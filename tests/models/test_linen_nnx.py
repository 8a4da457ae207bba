"""`Linen` and `NNX`: outputs, gradients, norm modes, dropout and paths of wrapped modules."""

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
from jaxft.models.nnx_adapter import with_nnx_keys
from jaxft.models.norm_modes import norm_modes

sys.path.insert(0, str(Path(__file__).parent))
from user_modules import Attention, BFloat16, Compact, ModeFlag, Nested, TrainingArgument

SHAPE = (6, 6, 3)
KEY = jax.random.key(7)
IMAGES = 1 + 2 * jax.random.normal(jax.random.key(1), (4, *SHAPE))
# name: (model, flags of its call in training, flags of its call in evaluation)
NETWORKS = {
    "compact": (Linen(Compact(), shape=SHAPE, head="head"), {"train": True}, {"train": False}),
    "bfloat16": (Linen(BFloat16(), shape=SHAPE, head="head"), {"deterministic": False}, {}),
    "attention": (Linen(Attention(), shape=SHAPE, head="head"), {}, {}),
    "training argument": (
        NNX(TrainingArgument, shape=SHAPE, head="fc"),
        {"training": True},
        {"training": False},
    ),
    "mode flag": (NNX(ModeFlag, shape=SHAPE, head="head.out"), {}, {}),
}
NESTED = Linen(Nested(), shape=SHAPE, head="out")
MODELS = {name: model for name, (model, *_) in NETWORKS.items()} | {"nested": NESTED}
WITH_NORMS = {name: MODELS[name] for name in MODELS if name != "attention"}


def init(model):
    """Parameters and statistics that differ from their initial values."""
    trees = model.init(jax.random.key(0))
    return jax.tree.map(lambda x: x + 0.1 * (1 + jnp.arange(x.shape[-1], dtype=x.dtype)), trees)


def apply_module(model, params, stats, images, flags, is_training):
    """Calls the module itself: float32 logits and the statistics after the call."""
    if isinstance(model, Linen):
        rngs = {"dropout": KEY, "drop_path": jax.random.fold_in(KEY, 1)} if is_training else {}
        logits, new = model.module.apply(
            {"params": params, "batch_stats": stats}, images, rngs=rngs, mutable=["batch_stats"],
            **flags,
        )  # fmt: skip
        return logits.astype(jnp.float32), new.get("batch_stats", {})
    graph, *states, streams = nnx.split(
        model.build(rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat, ...
    )
    pure = [
        with_nnx_keys(tree, nnx.to_pure_dict(state))
        for tree, state in zip((params, stats), states, strict=True)
    ]
    module = nnx.merge(graph, *pure, streams)
    module.train() if is_training else module.eval()
    return module(images, **flags), model.trees(module)[1]


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def paths_of(tree):
    return set(jaxft.paths(tree))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_user_model_apply_equals_the_module(name):
    model, train_flags, eval_flags = NETWORKS[name]
    params, stats = init(model)
    norms = "running" if name == "bfloat16" else "batch"  # this module always uses running ones
    actual = model.apply(params, stats, IMAGES, norms=norms, key=KEY)
    assert_identical(actual, apply_module(model, params, stats, IMAGES, train_flags, True))
    actual = model.apply(params, stats, IMAGES, norms="running")
    assert_identical(actual, apply_module(model, params, stats, IMAGES, eval_flags, False))
    assert actual[1] is stats
    assert actual[0].dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.parametrize("name", ["compact", "training argument", "mode flag"])
def test_user_model_gradients_equal_the_modules(name):
    model, flags, _ = NETWORKS[name]
    params, stats = init(model)

    def gradients(call):
        return jax.grad(lambda params: jnp.square(call(params)[0]).mean())(params)

    actual = gradients(lambda p: model.apply(p, stats, IMAGES, norms="batch", key=KEY))
    expected = gradients(lambda p: apply_module(model, p, stats, IMAGES, flags, True))
    assert all(leaf.any() for leaf in jax.tree.leaves(expected))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_NORMS)
def test_user_model_norm_mode_per_layer(name):
    model = WITH_NORMS[name]
    params, stats = init(model)
    apply = partial(model.apply, params, stats, IMAGES)
    layers = sorted(path.rpartition(".")[0] for path in paths_of(stats) if path.endswith(".mean"))
    assert len(layers) == {"compact": 2, "mode flag": 2}.get(name, 1)
    outputs = {
        mode: {
            layer: apply(norms=dict.fromkeys(layers, "running") | {layer: mode}) for layer in layers
        }
        for mode in ("running", "batch", "batch_fixed")
    }
    for layer in layers:
        running, batch, batch_fixed = (outputs[mode][layer] for mode in outputs)
        assert running[1] is batch_fixed[1] is stats
        assert not np.array_equal(running[0], batch[0])
        np.testing.assert_array_equal(batch[0], batch_fixed[0])
        changed = jax.tree.map(lambda a, b: a is not b, stats, batch[1])
        flat = zip(jaxft.paths(stats), jax.tree.leaves(changed), strict=True)
        assert {path for path, changed in flat if changed} == {f"{layer}.mean", f"{layer}.var"}
    all_batch, mixed = (
        apply(norms=norms)
        for norms in ("batch", dict.fromkeys(layers, "batch_fixed") | {layers[0]: "batch"})
    )
    np.testing.assert_array_equal(mixed[0], all_batch[0])
    for path, actual, updated, old in zip(
        jaxft.paths(stats), *map(jax.tree.leaves, (mixed[1], all_batch[1], stats)), strict=True
    ):
        expected = updated if path.startswith(f"{layers[0]}.") else old
        np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_user_model_mask_leaves_out_padding(name):
    model = MODELS[name]
    params, stats = init(model)
    norms = "batch" if stats else "running"
    expected, expected_stats = model.apply(params, stats, IMAGES[:3], norms=norms)
    padded = IMAGES.at[3].set(1e3)
    mask = jnp.array([True, True, True, False])
    logits, new_stats = jax.jit(partial(model.apply, norms=norms))(params, stats, padded, mask=mask)
    atol = 5e-3 if name == "bfloat16" else 1e-4
    assert_close = partial(np.testing.assert_allclose, rtol=1e-4, atol=atol)
    assert_close(logits[:3], expected)
    jax.tree.map(assert_close, new_stats, expected_stats)


WITH_DROPOUT = {
    "linen": lambda rate: Linen(Compact(dropout=rate), shape=SHAPE, head="head"),
    "always on": lambda rate: Linen(Nested(dropout=rate), shape=SHAPE, head="out"),
    "training argument": lambda rate: NNX(
        partial(TrainingArgument, dropout=rate), shape=SHAPE, head="fc"
    ),
    "mode flag": lambda rate: NNX(partial(ModeFlag, dropout=rate), shape=SHAPE, head="head.out"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_user_model_dropout_depends_on_the_key(name):
    model, without_dropout = WITH_DROPOUT[name](0.5), WITH_DROPOUT[name](0.0)
    params, stats = init(model)

    def logits(model, key=None):
        return np.asarray(model.apply(params, stats, IMAGES, norms="running", key=key)[0])

    np.testing.assert_array_equal(logits(model), logits(without_dropout))
    np.testing.assert_array_equal(logits(model, KEY), logits(model, KEY))
    keys = (None, KEY, jax.random.key(8))
    assert len({logits(model, key).tobytes() for key in keys}) == 3


def test_nnx_dropout_layers_draw_different_masks():
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
    masks = model.apply(*model.init(KEY), IMAGES, norms="running", key=KEY)[0]
    assert {*np.unique(masks)} == {0.0, 1.0, 2.0, 3.0}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_user_model_patterns_and_norm_modes_use_the_modules_paths(name):
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


def test_user_model_paths():
    assert paths_of(MODELS["compact"].init(KEY)[0]) >= {"Conv_0.kernel", "BatchNorm_1.scale"}
    assert paths_of(NESTED.init(KEY)[1]) == {"block.bn.mean", "block.bn.var"}
    params, _ = MODELS["mode flag"].init(KEY)
    assert paths_of(params) >= {"body.layers.0.kernel", "body.layers.1.scale", "head.out.bias"}
    assert all(isinstance(key, str) for key in params["body"]["layers"])
    variables = Compact().init(KEY, IMAGES, train=False)
    trees = MODELS["compact"].init(KEY)
    assert_identical(trees, (variables["params"], variables["batch_stats"]))


def test_user_model_equality_and_hash():
    for make in (
        lambda width: Linen(Compact(width), shape=[*SHAPE], head="head"),
        lambda width: NNX(
            TrainingArgument if width else ModeFlag, shape=SHAPE, head="fc" if width else "head"
        ),
    ):
        assert make(0.5) == make(0.5)
        assert hash(make(0.5)) == hash(make(0.5))
        assert make(0.5) != make(0.0)


def test_user_model_call_selects_inputs_and_logits():
    class DictOutput(nn.Module):
        @nn.compact
        def __call__(self, x, mode):
            return {"logits": nn.Dense(2, name="out")(x.mean((1, 2))) * (2 if mode == "fit" else 1)}

    def call(module, images, is_training):
        return module(images[..., :1], mode="fit" if is_training else "eval")["logits"]

    model = Linen(DictOutput(), shape=SHAPE, head="out", call=call)
    params, stats = model.init(KEY)
    assert params["out"]["kernel"].shape == (1, 2)
    evaluated, trained = (
        model.apply(params, stats, IMAGES, norms="running", key=k)[0] for k in (None, KEY)
    )
    np.testing.assert_array_equal(2 * evaluated, trained)
