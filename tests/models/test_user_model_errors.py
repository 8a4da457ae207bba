"""Modules that cannot be networks, and calls that a module of the user's own cannot take."""

import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

from jaxft.errors import ModelError
from jaxft.models import NNX, Linen

sys.path.insert(0, str(Path(__file__).parent))
from user_modules import Compact, Told

SHAPE = (6, 6, 3)
LINEN = Linen(Compact(), shape=SHAPE, head="head")
MODELS = {"linen": LINEN, "nnx": NNX(Told, shape=SHAPE, head="fc")}


class Listed(nn.Module):
    widths: list

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(x.mean((1, 2)))


class Bare(Listed):
    """Logits of each pixel."""

    widths: tuple = ()

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(x)


class Sown(Bare):
    @nn.compact
    def __call__(self, x):
        self.sow("losses", "l2", x.sum())
        return nn.Dense(2, name="head")(x.mean((1, 2)))


class Spectral(Bare):
    @nn.compact
    def __call__(self, x):
        return nn.SpectralNorm(nn.Dense(2), name="head")(x.mean((1, 2)), update_stats=False)


class Flat(nnx.Module):
    """Made for images of 8 pixels."""

    def __init__(self, *, rngs):
        self.head = nnx.Linear(8 * 8 * 3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(x.reshape(len(x), -1))


class Stateful(nnx.Module):
    def __init__(self, state, *, rngs):
        self.head = nnx.Linear(3, 2, rngs=rngs)
        self.state = state()

    def __call__(self, x):
        return self.head(x.mean((1, 2)))


def stateful(state):
    return NNX(partial(Stateful, state), shape=SHAPE, head="head")


def linen(module, head="head"):
    return Linen(module, shape=SHAPE, head=head)


UNFIT = {
    "no shape": (lambda: Linen(Bare(), shape=32, head="head"), r"shape is 32; it must be .*h, w"),
    "a shape of a batch": (
        lambda: Linen(Bare(), shape=(1, 6, 6, 3), head="head"), r"shape is \(1, 6, 6, 3\)",
    ),
    "a shape of nothing": (lambda: NNX(Told, shape=(0, 6, 3), head="fc"), r"shape is \(0, 6, 3\)"),
    "built for another size": (
        lambda: NNX(Flat, shape=SHAPE, head="head"),
        r"(?s)Flat fails on images of shape \(6, 6, 3\): .*If it was built for another size",
    ),
    "a class for a module": (lambda: linen(Bare), r"not the class Bare: call it, Bare\(...\)"),
    "another framework's": (lambda: linen(Flat(rngs=nnx.Rngs(0))), "flax.linen module, not a Flat"),
    "an instance": (
        lambda: NNX(Flat(rngs=nnx.Rngs(0)), shape=SHAPE, head="head"),
        r"got a Flat that is built: give the class, model = NNX\(Flat, ...\).*model.trees\(",
    ),
    "no such head": (lambda: linen(Compact(), "haed"), "'haed'.\n  Did you mean 'head'"),
    "half a name": (lambda: linen(Compact(), "hea"), "at its head, 'hea'"),
    "no logits": (lambda: linen(Bare()), r"Bare makes \[2, 6, 6, 2\] of images \[2, 6, 6, 3\]"),
    "a collection": (lambda: linen(Sown()), "Sown also has the collections losses"),
    "a foreign norm": (lambda: linen(Spectral(), "Dense_0"), "statistics in .*, which are no"),
    "a variable": (lambda: stateful(lambda: nnx.Cache(jnp.ones(2))), "has state at state that"),
    "an array": (lambda: stateful(lambda: jnp.ones(2)), "Stateful has state at state that is nei"),
    "data": (lambda: stateful(lambda: nnx.data(jnp.ones(2))), "has state at state that is neither"),
    "nnx norm": (lambda: stateful(lambda: nnx.BatchStat(jnp.ones(2))), "running statistics in "),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), UNFIT.values(), ids=UNFIT)
def test_modules_that_cannot_be_networks(make, message):
    with pytest.raises(ModelError, match=message):
        make()


def test_linen_module_whose_fields_cannot_be_hashed_is_a_network():
    """As those of Hugging Face, whose config compares by value and has no hash."""
    model, again, other = linen(Listed([1])), linen(Listed([1])), linen(Listed([2]))
    assert hash(model) == hash(again)
    assert model == again != other
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    step = jax.jit(lambda model, *trees: model.apply(*trees, norms="running")[0], static_argnums=0)
    logits = jax.eval_shape(partial(step, model), *shapes, jnp.ones((2, *SHAPE)))
    assert logits.shape == (2, 2)


CALLS = {
    "a part": ({"last": "head"}, "is one block, 'network'"),
    "another size": ({"inputs": jnp.ones((2, 8, 8, 3))}, r"6, 6, 3\], and got \[2, 8, 8, 3\]"),
    "replicas": ({"replicas": 2}, "replicas must be 1, not 2"),
    "unknown mode": ({"norms": "eval"}, "not 'eval'"),
    "no such norm": ({"norms": {"bn9": "batch"}}, r"missing or unknown: .*bn9"),
    "rows": ({"norms": "batch", "mask": jnp.ones(3, bool)}, "in a batch of 3: which of its rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("options", "message"), CALLS.values(), ids=CALLS)
def test_calls_that_cannot_be(name, options, message):
    model = MODELS[name]
    given = {"inputs": jnp.ones((2, *SHAPE)), "norms": "running"} | options

    def call(params, stats):
        return model.apply(params, stats, **given)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, *jax.eval_shape(model.init, jax.random.key(0)))
