"""Blocks of `Linen` and `NNX` modules: the chain of blocks equals the module."""

import re
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from jaxft.errors import ModelError
from jaxft.models import NNX, Linen

sys.path.insert(0, str(Path(__file__).parent))
from block_modules import CNN, SHAPE, VIT, LinenLayer, ResCNN, ViT, images
from user_modules import BFloat16, ModeFlag, Nested

MODELS = {"linen": CNN, "nnx": VIT}
KEY = jax.random.key(7)


def init64(model):
    """Float64 parameters and statistics that differ from their initial values."""
    trees = model.init(jax.random.key(0))
    return jax.tree.map(lambda x: x.astype("f8") + 0.1 * (1 + jnp.arange(x.shape[-1])), trees)


BLOCKS = {
    "linen": (
        CNN,
        {
            "stem": ("Conv_0",),
            "ResBlock_0": ("ResBlock_0", "ResBlock_1"),
            "ResBlock_2": ("ResBlock_2",),
            "head": ("head",),
        },
    ),
    "first submodule, and a dropout that is listed": (
        NNX(ViT, shape=SHAPE, head="head", blocks=("patches", "norm", "drop")),
        {"patches": ("patches", "layers"), "norm": ("norm",), "head": ("head",)},
    ),
    "without a path": (
        Linen(ResCNN(), shape=SHAPE, head="head"),
        {"stem": ("Conv_0", *(f"ResBlock_{i}" for i in range(3))), "head": ("head",)},
    ),
    "names instead of paths": (
        Linen(ResCNN(), shape=SHAPE, head="head", blocks=CNN.blocks),
        dict(zip(CNN.blocks, CNN.block_patterns, strict=True)),
    ),
    "half precision": (
        Linen(BFloat16(), shape=SHAPE, head="head"),
        {"stem": ("Conv_0", "RunningBatchNorm_0"), "head": ("head",)},
    ),
    "head within a dict": (
        NNX(ModeFlag, shape=SHAPE, head="head.out"),
        {"stem": ("body",), "head": ("head",)},
    ),
    "module as a field": (
        Linen(Nested(), shape=SHAPE, head="out"),
        {"stem": ("block",), "head": ("out",)},
    ),
    "nothing to call at the head": (NNX(ModeFlag, shape=SHAPE, head="head"), {"network": ("*",)}),
}


@pytest.mark.parametrize(("model", "blocks"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_and_their_patterns(model, blocks):
    patterns = [set(each) for each in model.block_patterns]
    assert dict(zip(model.blocks, patterns, strict=True)) == {b: {*p} for b, p in blocks.items()}


def test_blocks_in_equality_and_hash():
    given = {"linen": {"blocks": CNN.blocks}, "other": {"blocks": ("ResBlock_1",)}, "none": {}}
    models = {k: Linen(ResCNN(), shape=SHAPE, head="head", **v) for k, v in given.items()}
    assert models["linen"] == CNN
    assert hash(models["linen"]) == hash(CNN)
    assert len({*models.values()}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("norms", ["running", "batch"])
@pytest.mark.parametrize("key", [None, KEY], ids=["eval", "train"])
@pytest.mark.parametrize("name", MODELS)
def test_chain_of_blocks_equals_the_module(name, key, norms):
    model = MODELS[name]
    with jax.enable_x64(True):
        params, stats = init64(model)
        apply = jax.jit(
            partial(model.apply, norms=norms, key=key), static_argnames=("first", "last")
        )
        x = images(dtype=jnp.float64)
        logits, new_stats = apply(params, stats, x)
        chain = stats
        for block in model.blocks:
            rest, _ = apply(params, chain, x, first=block)
            np.testing.assert_allclose(rest, logits, rtol=1e-12)
            until, until_stats = apply(params, stats, images(dtype=jnp.float64), last=block)
            x, chain = apply(params, chain, x, first=block, last=block)
            np.testing.assert_allclose(until, x, rtol=1e-12)
            assert x.dtype == jnp.float64
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), until_stats, chain)
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12), chain, new_stats)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_gradients_through_the_chain_equal_the_modules(name):
    model = MODELS[name]

    def chained(params, stats, x):
        for block in model.blocks:
            x, stats = model.apply(
                params, stats, x, norms="batch", key=KEY, first=block, last=block
            )
        return x

    def whole(params, stats, x):
        return model.apply(params, stats, x, norms="batch", key=KEY)[0]

    with jax.enable_x64(True):
        params, stats = init64(model)
        actual, expected = (
            jax.jit(jax.grad(lambda p, run=run: jnp.square(run(p, stats, images())).mean()))(params)
            for run in (chained, whole)
        )
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12), actual, expected)


def test_blocks_update_their_own_statistics_alone():
    params, stats = CNN.init(KEY)
    features, _ = CNN.apply(params, stats, images(), norms="running", last="ResBlock_0")
    _, new = CNN.apply(params, stats, features, norms="batch", first="ResBlock_2")
    kept = jax.tree.map(np.array_equal, new, stats)
    assert not any(jax.tree.leaves(kept.pop("ResBlock_2")))
    assert all(jax.tree.leaves(kept))


def test_late_blocks_do_not_depend_on_parameters_of_early_ones():
    """Even if these are NaN, and their outputs for the images that stand in for features."""
    params, stats = VIT.init(KEY)
    features, _ = VIT.apply(params, stats, images(), norms="running", last="layers.1")
    expected, _ = VIT.apply(params, stats, features, norms="running", first="layers.2")
    broken = params | {"patches": jax.tree.map(lambda x: x * jnp.nan, params["patches"])}
    actual, _ = VIT.apply(broken, stats, features, norms="running", first="layers.2")
    np.testing.assert_array_equal(actual, expected)


class Skips(nn.Module):
    """A chain of Dense layers; `to_c` selects the input of `c`."""

    to_c: str = "b"
    repeat_b: int = 1

    @nn.compact
    def __call__(self, x, train: bool):
        x = x.mean((1, 2))
        a = b = nn.Dense(4, name="a")(x)
        layer = nn.Dense(4, name="b")
        for _ in range(self.repeat_b):
            b = layer(b)
        inputs = {"b": b, "a, b": (a, b), "a + b": a + b, "x + b": b + x.sum(1, keepdims=True)}
        inputs["in training"] = inputs["a + b" if train else "b"]
        return nn.Dense(5, name="head")(AddsPair(name="c")(inputs[self.to_c]))


class AddsPair(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x[0] + x[1] if isinstance(x, tuple) else x)


class Wraps(nn.Module):
    """Calls `inner` within a transform."""

    transform: str

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=2, name="stem")(x).reshape(len(x), -1, 8)
        axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
        if self.transform == "remat":
            x, _ = nn.remat(LinenLayer)(name="inner")(x, None)
        elif self.transform == "jit":
            x, _ = nn.jit(LinenLayer)(name="inner")(x, None)
        else:
            x, _ = nn.scan(LinenLayer, length=2, **axes)(name="inner")(x, None)
        return nn.Dense(5, name="head")(x.mean(1))


class SharedNorm(nnx.Module):
    def __init__(self, *, rngs):
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.mix = nnx.Linear(3, 3, rngs=rngs)
        self.head = nnx.Linear(3, 5, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.mix(self.norm(x))).mean((1, 2)))


class NNXSkip(nnx.Module):
    def __init__(self, *, rngs):
        self.layers = nnx.List([nnx.Linear(3, 3, rngs=rngs) for _ in range(3)])
        self.unused = nnx.Linear(3, 3, rngs=rngs)
        self.head = nnx.Linear(3, 5, rngs=rngs)

    def __call__(self, x):
        a = self.layers[0](x.mean((1, 2)))
        return self.head(a + self.layers[2](nnx.relu(self.layers[1](a))))


def skips(blocks, **fields):
    return Linen(Skips(**fields), shape=SHAPE, head="head", blocks=blocks)


def wraps(transform):
    return Linen(Wraps(transform), shape=SHAPE, head="head", blocks=("inner",))


NUMBERS = r"change by up to \d\S*; the largest is \d\S*\. Choose a submodule"
TRANSFORM = r"cannot begin at 'inner': it is called within a transform, such as remat, scan"


class FailsInTraining(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dense(4, name="a")(x.mean((1, 2)))
        return nn.Dense(5, name="head")(jnp.concatenate([x, x[0]]) if train else x)


WRONG = {
    "fails in training": (
        lambda: Linen(FailsInTraining(), shape=SHAPE, head="head", blocks=("a",)),
        "FailsInTraining fails in training: TypeError: Cannot concatenate",
    ),
    "string": (lambda: skips("b"), r"blocks is 'b'; it must be a tuple of paths: \('b',\)"),
    "unknown": (lambda: skips(("bb",)), r"calls no submodule 'bb'.*\n.*Did you mean 'b'"),
    "order": (lambda: skips(("c", "b")), "in another order than blocks has: b, c, head"),
    "twice in blocks": (lambda: skips(("b", "b")), "two blocks are called b"),
    "called twice": (lambda: skips(("b",), repeat_b=2), "at 'b': it is called 2 times"),
    "not one array": (lambda: skips(("c",), to_c="a, b"), "argument is no array: it is a tuple"),
    "skip": (
        lambda: skips(("a", "b"), to_c="a + b"),
        r"at 'b': what follows it also depends on the input of 'a' by another.*" + NUMBERS,
    ),
    "skip from the images": (
        lambda: skips(("b",), to_c="x + b"),
        "at 'b': what follows it also depends on the images by another way.*" + NUMBERS,
    ),
    "skip in training": (
        lambda: skips(("b",), to_c="in training"),
        "at 'b': what follows it also depends on the images by another way.*" + NUMBERS,
    ),
    "remat": (lambda: wraps("remat"), TRANSFORM),
    "jit": (lambda: wraps("jit"), TRANSFORM),
    "scan": (lambda: wraps("scan"), TRANSFORM),
    "norm in two blocks": (
        lambda: NNX(SharedNorm, shape=SHAPE, head="head", blocks=("mix",)),
        "the norm layer norm is called in several blocks, stem and mix",
    ),
    "nnx skip": (
        lambda: NNX(NNXSkip, shape=SHAPE, head="head", blocks=("layers.1",)),
        "at 'layers.1': what follows it also depends on the images.*" + NUMBERS,
    ),
    "nnx not called": (
        lambda: NNX(NNXSkip, shape=SHAPE, head="head", blocks=("unused",)),
        "cannot begin at 'unused': it is not called in evaluation",
    ),
}


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_wrong_blocks_are_refused(make, message):
    with pytest.raises(ModelError, match=message):
        make()


@pytest.mark.parametrize("to_c", ["a + b", "in training"])
def test_wrong_cut_changes_the_logits_by_numbers_above_0(to_c):
    with pytest.raises(ModelError) as caught:
        skips(("b",), to_c=to_c)
    numbers = re.search(r"by up to (\S+); the largest is (\S+)\.", str(caught.value)).groups()
    difference, largest = map(float, numbers)
    assert 0.1 * largest < difference < 10 * largest


def test_network_without_blocks_that_cannot_be_cut_is_one_block():
    class SkipsHead(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="a")(x.mean((1, 2)))
            return nn.Dense(4, name="head")(x) + x

    model = Linen(SkipsHead(), shape=SHAPE, head="head")
    assert (model.blocks, model.block_patterns) == (("network",), (("*",),))
    params, stats = model.init(KEY)
    whole = model.apply(params, stats, images(), norms="running", first="network")[0]
    np.testing.assert_array_equal(whole, model.apply(params, stats, images(), norms="running")[0])


def test_parameter_of_two_blocks_belongs_to_the_first():
    class Tied(nnx.Module):
        def __init__(self, *, rngs):
            self.shared = nnx.Param(jnp.ones(3))
            self.mix = nnx.Linear(3, 3, rngs=rngs)
            self.head = nnx.Linear(3, 5, rngs=rngs)

        def __call__(self, x):
            return self.head(self.mix(x.mean((1, 2)) * self.shared[...]) * self.shared[...])

    model = NNX(Tied, shape=SHAPE, head="head", blocks=("mix",))
    assert model.block_patterns == (("shared",), ("mix",), ("head",))


FEATURES = {
    "another width": (jnp.ones((2, 7)), r"takes features \[2, 8\], and got \[2, 7\]"),
    "images": (images(2), r"takes features \[2, 8\], and got \[2, 8, 8, 3\]"),
}


@pytest.mark.parametrize(("features", "message"), FEATURES.values(), ids=FEATURES)
def test_features_that_do_not_fit_are_refused(features, message):
    params, stats = CNN.init(KEY)
    with pytest.raises(ModelError, match=message):
        CNN.apply(params, stats, features, norms="running", first="head")


def test_blocks_out_of_order_are_refused():
    with pytest.raises(ModelError, match="no blocks from 'head' to 'stem'; its blocks are, in ord"):
        CNN.apply(*CNN.init(KEY), images(), norms="running", first="head", last="stem")
