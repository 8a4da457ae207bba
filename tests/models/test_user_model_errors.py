"""Modules that `Linen` and `NNX` reject, and arguments that `apply` rejects."""

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
from user_modules import Compact, TrainingArgument

SHAPE = (6, 6, 3)
LINEN = Linen(Compact(), shape=SHAPE, head="head")
MODELS = {"linen": LINEN, "nnx": NNX(TrainingArgument, shape=SHAPE, head="fc")}


class UnhashableField(nn.Module):
    widths: list

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(x.mean((1, 2)))


class PixelLogits(UnhashableField):
    """Returns logits for each pixel."""

    widths: tuple = ()

    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(x)


class SownLoss(PixelLogits):
    @nn.compact
    def __call__(self, x):
        self.sow("losses", "l2", x.sum())
        return nn.Dense(2, name="head")(x.mean((1, 2)))


class SpectralNorm(PixelLogits):
    @nn.compact
    def __call__(self, x):
        return nn.SpectralNorm(nn.Dense(2), name="head")(x.mean((1, 2)), update_stats=False)


class Size8(nnx.Module):
    """Accepts images of 8 pixels only."""

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


REJECTED = {
    "one number as shape": (
        lambda: Linen(PixelLogits(), shape=32, head="head"),
        r"shape is 32; it must be .*h, w",
    ),
    "shape of a batch": (
        lambda: Linen(PixelLogits(), shape=(1, 6, 6, 3), head="head"),
        r"shape is \(1, 6, 6, 3\)",
    ),
    "empty shape": (
        lambda: NNX(TrainingArgument, shape=(0, 6, 3), head="fc"),
        r"shape is \(0, 6, 3\)",
    ),
    "wrong image size": (
        lambda: NNX(Size8, shape=SHAPE, head="head"),
        r"(?s)Size8 fails on images of shape \(6, 6, 3\): .*If it was built for another size",
    ),
    "class instead of instance": (
        lambda: linen(PixelLogits),
        r"not the class PixelLogits: create an instance, PixelLogits\(...\)",
    ),
    "nnx module in Linen": (
        lambda: linen(Size8(rngs=nnx.Rngs(0))),
        "flax.linen module, not a Size8",
    ),
    "instance in NNX": (
        lambda: NNX(Size8(rngs=nnx.Rngs(0)), shape=SHAPE, head="head"),
        r"not an instance of Size8: pass the class, model = NNX\(Size8, ...\).*model.trees\(",
    ),
    "unknown head": (lambda: linen(Compact(), "haed"), "'haed'.\n  Did you mean 'head'"),
    "prefix of a name as head": (lambda: linen(Compact(), "hea"), "at its head, 'hea'"),
    "no logits": (
        lambda: linen(PixelLogits()),
        r"PixelLogits returns \[2, 6, 6, 2\] for images \[2, 6, 6, 3\]",
    ),
    "other collection": (lambda: linen(SownLoss()), "SownLoss also has the collections losses"),
    "other linen norm": (
        lambda: linen(SpectralNorm(), "Dense_0"),
        "statistics in .*, which are not Flax BatchNorm",
    ),
    "other variable": (lambda: stateful(lambda: nnx.Cache(jnp.ones(2))), "has state at state that"),
    "raw array": (lambda: stateful(lambda: jnp.ones(2)), "Stateful has state at state that is nei"),
    "nnx.data": (
        lambda: stateful(lambda: nnx.data(jnp.ones(2))),
        "has state at state that is neither",
    ),
    "other nnx norm": (
        lambda: stateful(lambda: nnx.BatchStat(jnp.ones(2))),
        "running statistics in ",
    ),
}


@pytest.mark.parametrize(("make", "message"), REJECTED.values(), ids=REJECTED)
def test_user_model_rejects_unfit_modules(make, message):
    with pytest.raises(ModelError, match=message):
        make()


def test_linen_module_with_unhashable_fields():
    """Hugging Face modules have them: their config compares by value and has no hash."""
    model, same, other = (
        linen(UnhashableField([1])),
        linen(UnhashableField([1])),
        linen(UnhashableField([2])),
    )
    assert hash(model) == hash(same)
    assert model == same != other
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    step = jax.jit(lambda model, *trees: model.apply(*trees, norms="running")[0], static_argnums=0)
    logits = jax.eval_shape(partial(step, model), *shapes, jnp.ones((2, *SHAPE)))
    assert logits.shape == (2, 2)


REJECTED_ARGUMENTS = {
    "unknown block": ({"last": "network"}, "'network'; its blocks are, in order: stem, head"),
    "wrong image size": ({"inputs": jnp.ones((2, 8, 8, 3))}, r"6, 6, 3\], and got \[2, 8, 8, 3\]"),
    "replicas": ({"replicas": 2}, "replicas must be 1, not 2"),
    "unknown mode": ({"norms": "eval"}, "not 'eval'"),
    "unknown norm": ({"norms": {"bn9": "batch"}}, r"missing or unknown: .*bn9"),
    "mask of wrong length": (
        {"norms": "batch", "mask": jnp.ones(3, bool)},
        "in a batch of 3: its padding rows are",
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("options", "message"), REJECTED_ARGUMENTS.values(), ids=REJECTED_ARGUMENTS
)
def test_user_model_apply_rejects_arguments(name, options, message):
    model = MODELS[name]
    arguments = {"inputs": jnp.ones((2, *SHAPE)), "norms": "running"} | options

    def call(params, stats):
        return model.apply(params, stats, **arguments)

    with pytest.raises(ValueError, match=message):
        jax.eval_shape(call, *jax.eval_shape(model.init, jax.random.key(0)))
