"""Labels with nnx.Optimizer: all gradients, or only those of the variables that train."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxft
from jaxft import LabelError, PatternError

X = jax.random.normal(jax.random.key(7), (8, 4))


class Net(nnx.Module):
    """Has parameters, batch statistics and a random state."""

    def __init__(self, rngs):
        self.body = nnx.List([nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)])
        self.bn = nnx.BatchNorm(3, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(self.bn(self.body[1](self.body[0](x)))))


def loss(net):
    return jnp.mean((net(X) - 1) ** 2)


def params_of(net):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.Param)))


SOURCES = {
    "module": lambda net: net,
    "whole state": nnx.state,
    "state": lambda net: nnx.state(net, nnx.Param),
    "pure state": lambda net: nnx.as_pure(nnx.state(net, nnx.Param)),
    "pure dict": lambda net: nnx.to_pure_dict(nnx.state(net, nnx.Param)),
    "shapes": lambda net: jax.eval_shape(lambda: nnx.state(net, nnx.Param)),
}


@pytest.mark.parametrize("gradients", ["all", "trainable"])
@pytest.mark.parametrize("source", SOURCES)
def test_nnx_optimizer_trains_by_labels(source, gradients):
    net = Net(nnx.Rngs(0))
    labels = jaxft.label(SOURCES[source](net), {"head": "head", "body.1": "late"})
    tx = jaxft.multi_transform({"head": optax.adam(0.1), "late": optax.sgd(0.1)}, labels)
    wrt = nnx.Param if gradients == "all" else jaxft.trainable_filter(labels)
    optimizer = nnx.Optimizer(net, tx, wrt=wrt)

    @nnx.jit
    def step(net, optimizer):
        optimizer.update(net, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(net))

    before = params_of(net)
    for _ in range(2):
        step(net, optimizer)
    leaves = zip(jaxft.paths(before), *map(jax.tree.leaves, (before, params_of(net))), strict=True)
    changed = {path for path, old, new in leaves if not np.array_equal(old, new)}
    expected = {"head.kernel", "head.bias", "body.1.kernel"}  # the batch norm subtracts the bias
    assert changed - {"body.1.bias"} == expected


@pytest.mark.slow
def test_nnx_optimizer_has_the_same_result_with_trainable_gradients():
    after = []
    for gradients in ("all", "trainable"):
        net = Net(nnx.Rngs(0))
        labels = jaxft.label(net, {"head": "head"})
        tx = jaxft.multi_transform({"head": optax.adam(0.1)}, labels)
        wrt = nnx.Param if gradients == "all" else jaxft.trainable_filter(labels)
        optimizer = nnx.Optimizer(net, tx, wrt=wrt)
        for _ in range(2):
            optimizer.update(net, nnx.grad(loss, argnums=nnx.DiffState(0, wrt))(net))
        after.append(params_of(net))
    jax.tree.map(np.testing.assert_array_equal, *after)


def test_label_freezes_batch_statistics_and_random_states_of_a_module():
    net = Net(nnx.Rngs(0))
    labels = jaxft.label(net, {"*": "all"})
    named = zip(jaxft.paths(net), jax.tree.leaves(labels), strict=True)
    frozen = {path for path, name in named if name == "frozen"}
    assert frozen == {"bn.mean", "bn.var", "drop.rngs.count", "drop.rngs.key"}
    with pytest.raises(PatternError, match=r"never train: bn.mean \(BatchStat\)\."):
        jaxft.label(net, {re.compile(r".*\.mean"): "x"})


def test_trainable_filter_selects_by_path_and_equals_another_of_the_same_labels():
    state = nnx.state(Net(nnx.Rngs(0)), nnx.Param)
    trains, same, other = (
        jaxft.trainable_filter(jaxft.label(state, {pattern: "x"}))
        for pattern in ("body.1", "body.1", "head")
    )
    assert (trains, hash(trains)) == (same, hash(same))
    assert trains != other
    selected, rest = nnx.split_state(state, trains, ...)
    assert jaxft.paths(selected) == ["body.1.bias", "body.1.kernel"]
    assert len(jaxft.paths(rest)) == 6


def test_trainable_filter_selects_a_variable_that_holds_a_tree():
    net = nnx.Dict(lora=nnx.Param({"a": jnp.ones(1), "b": jnp.ones(2)}), w=nnx.Param(jnp.ones(1)))
    trains = jaxft.trainable_filter(jaxft.label(net, {"lora.a": "x"}))
    assert jaxft.paths(nnx.state(net, trains)) == ["lora.a", "lora.b"]


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(4, 3, rngs=rngs)
        self.head = self.embed

    def __call__(self, x):
        return self.head.attend(self.embed(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda net: jaxft.label(net, {"head": "head"}),
        lambda net: jaxft.plan(jaxft.Stage("all", {"*": 0.1}, 1), net),
        lambda net: jaxft.partition(net, jax.tree.map(lambda _: "x", net)),
    ],
    ids=["label", "plan", "partition"],
)
def test_tied_module_is_refused(function):
    message = "'embed.embedding' and 'head.embedding' are the same variable.*nnx.state"
    with pytest.raises(LabelError, match=message):
        function(Tied(nnx.Rngs(0)))


def test_state_of_a_tied_module_stays_tied():
    net = Tied(nnx.Rngs(0))
    graph, params = nnx.split(net, nnx.Param)
    labels = jaxft.label(params, {"embed": "x"})
    tied = nnx.merge(graph, jaxft.combine(*jaxft.partition(params, labels)))
    assert tied.head.embedding is tied.embed.embedding
    tx = jaxft.multi_transform({"x": optax.sgd(0.1)}, labels)
    optimizer = nnx.Optimizer(net, tx, wrt=jaxft.trainable_filter(labels))
    before = params_of(net)
    optimizer.update(net, nnx.grad(lambda net: net(jnp.arange(4)).sum())(net))
    assert net.head.embedding is net.embed.embedding
    assert not np.array_equal(params_of(net)["embed"]["embedding"], before["embed"]["embedding"])
