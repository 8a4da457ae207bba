"""Labels, plans and partitions of parameters from each framework: one network, the same paths."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import freeze
from flax.training.train_state import TrainState
from jax.sharding import NamedSharding, PartitionSpec

import jaxft
from jaxft import Adam, LabelError, PatternError, Stage
from jaxft.labels import filled

X = jax.random.normal(jax.random.key(7), (8, 4))


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(3, name="body")(x))
        return nn.Dense(2, name="head", kernel_init=nn.with_partitioning(nn.initializers.ones, ()))(
            x
        )


class NNXNet(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(4, 3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jnp.tanh(self.body(x)))


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


class Net(NamedTuple):
    body: Layer
    head: Layer


def plain():
    kernels = {"body": jnp.ones((4, 3)), "head": jnp.ones((3, 2))}
    return {name: {"kernel": k, "bias": jnp.zeros(k.shape[1])} for name, k in kernels.items()}


def apply_plain(params):
    x = jnp.tanh(X @ params["body"]["kernel"] + params["body"]["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"]


def as_dict(net):
    return {name: layer._asdict() for name, layer in net._asdict().items()}


def from_lists(net):
    return {name: {"kernel": kernel, "bias": bias} for name, (kernel, (bias,)) in net.items()}


@pytest.fixture(scope="module")
def networks():
    """Maps each name of NAMES to parameters and the function that applies them."""
    import equinox as eqx
    import haiku as hk

    class EquinoxNet(eqx.Module):
        body: eqx.nn.Linear
        head: eqx.nn.Linear
        activation: object  # a leaf that is no array

        def __call__(self, x):
            return self.head(self.activation(self.body(x)))

    def haiku_net(x):
        return hk.Linear(2, name="head")(jnp.tanh(hk.Linear(3, name="body")(x)))

    key = jax.random.key(0)
    net = plain()
    tuples = Net(Layer(**net["body"]), Layer(**net["head"]))
    lists = {name: [layer["kernel"], [layer["bias"]]] for name, layer in net.items()}
    linen = LinenNet().init(key, X)["params"]  # one of its kernels is boxed
    haiku = hk.without_apply_rng(hk.transform(haiku_net))
    module = NNXNet(nnx.Rngs(0))
    graph, state = nnx.split(module, nnx.Param)
    layers = (eqx.nn.Linear(4, 3, key=key), eqx.nn.Linear(3, 2, key=key))
    equinox = EquinoxNet(*layers, jnp.tanh)
    arrays, static = eqx.partition(equinox, eqx.is_array)
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.device_put(net, NamedSharding(mesh, PartitionSpec()))

    def apply_linen(params):
        return LinenNet().apply({"params": params}, X)

    return {
        "dict": (net, apply_plain),
        "named tuples": (tuples, lambda p: apply_plain(as_dict(p))),
        "nested lists": (lists, lambda p: apply_plain(from_lists(p))),
        "sharded": (sharded, apply_plain),
        "linen": (linen, apply_linen),
        "linen, frozen dict": (freeze(linen), apply_linen),
        "nnx, state": (state, lambda p: nnx.merge(graph, p)(X)),
        "nnx, module": (module, lambda p: p(X)),
        "nnx, pure dict": (nnx.to_pure_dict(state), lambda p: nnx.merge(graph, p)(X)),
        "haiku": (haiku.init(key, X), lambda p: haiku.apply(p, X)),
        "equinox": (arrays, lambda p: jax.vmap(eqx.combine(p, static))(X)),
        "equinox, whole": (equinox, lambda p: jax.vmap(p)(X)),
    }


NAMES = (
    "dict",
    "named tuples",
    "nested lists",
    "sharded",
    "linen",
    "linen, frozen dict",
    "nnx, state",
    "nnx, module",
    "nnx, pure dict",
    "haiku",
    "equinox",
    "equinox, whole",
)
LEAVES = {"haiku": ("w", "b"), "equinox": ("weight", "bias"), "nested lists": ("0", "1.0")}
frameworks = pytest.mark.parametrize("name", NAMES)


@frameworks
def test_paths_agree_across_frameworks(name, networks):
    kernel, bias = LEAVES.get(name.split(",")[0], ("kernel", "bias"))
    expected = {f"{layer}.{leaf}" for layer in ("body", "head") for leaf in (kernel, bias)}
    assert set(jaxft.paths(networks[name][0])) - {"activation"} == expected


@frameworks
def test_label_tree_has_structure_of_params_and_works_in_optax(name, networks):
    params, apply = networks[name]
    labels = jaxft.label(params, {"head": "head"})
    assert jax.tree.structure(labels) == jax.tree.structure(params)
    transforms = {"head": optax.sgd(0.1), "frozen": optax.set_to_zero()}
    # Optax would call a label tree that is itself a module.
    plain = optax.multi_transform(transforms, (lambda _: labels) if callable(labels) else labels)
    ours = jaxft.multi_transform({"head": optax.sgd(0.1)}, labels)
    trainable, frozen = jaxft.partition(params, labels)
    grads = jax.grad(lambda half: jnp.sum(apply(jaxft.combine(half, frozen)) ** 2))(trainable)
    found = [tx.update(grads, tx.init(params), trainable)[0] for tx in (plain, ours)]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)


@frameworks
def test_frozen_leaves_are_bit_identical_after_three_steps(name, networks):
    params, apply = networks[name]
    (plan,) = jaxft.plan([Stage("head", {"head": 0.1}, epochs=1)], params)
    transform = plan.transform(Adam())
    trainable, frozen = jaxft.partition(params, plan.labels)
    state = transform.init(params)
    for _ in range(3):
        grads = jax.grad(lambda half: jnp.sum(apply(jaxft.combine(half, frozen)) ** 2))(trainable)
        updates, state = transform.update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    after = jaxft.combine(trainable, frozen)
    assert jax.tree.structure(after) == jax.tree.structure(params)
    leaves = zip(jaxft.paths(params), *map(jax.tree.leaves, (params, after)), strict=True)
    for path, old, new in leaves:
        if path.startswith("head"):
            assert not np.array_equal(old, new), path
        else:
            assert old is new, path  # not even copied
        if name == "sharded":
            assert new.sharding.is_equivalent_to(old.sharding, old.ndim)


@frameworks
def test_partition_copies_nothing_and_combine_inverts_it(name, networks):
    params, _ = networks[name]
    halves = jaxft.partition(params, jaxft.label(params, {"head": "head"}))
    whole = jaxft.combine(*halves)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    ids = [[id(leaf) for leaf in jax.tree.leaves(tree)] for tree in (params, whole, *halves)]
    assert ids[0] == ids[1]
    assert sorted(ids[0]) == sorted(ids[2] + ids[3])


@frameworks
def test_label_of_shapes_equals_label_of_arrays(name, networks):
    import equinox as eqx

    params, _ = networks[name]
    arrays = eqx.filter(params, eqx.is_array)
    shapes = jax.eval_shape(lambda: arrays)
    labels = jaxft.label(shapes, {"head": "head"})
    assert jax.tree.leaves(labels) == jax.tree.leaves(jaxft.label(arrays, {"head": "head"}))
    assert "head" in jaxft.summary(shapes, labels)
    plan = jaxft.plan([Stage("all", {"*": 0.1}, 1)], shapes)[0]
    jax.eval_shape(plan.transform(Adam()).init, shapes)


def test_paths_of_lists_of_layers():
    layers = nnx.List([nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(i)) for i in range(2)])
    state = nnx.state(nnx.Dict(blocks=layers), nnx.Param)
    kernel, other = {"kernel": jnp.ones((2, 2))}, {"kernel": jnp.ones((2, 2))}
    trees = {"blocks": [kernel, other]}, nnx.Dict(blocks=layers), state, nnx.to_pure_dict(state)
    haiku = {"blocks/0": kernel, "blocks/~/1": other}
    for tree in (*trees, haiku):
        assert jaxft.paths(tree) == ["blocks.0.kernel", "blocks.1.kernel"]
        labels = jaxft.label(tree, {"blocks.1": "x"})
        assert jax.tree.leaves(labels) == ["frozen", "x"]
        assert jax.tree.structure(labels) == jax.tree.structure(tree)


def test_paths_of_nested_lists():
    params = [{"kernel": jnp.ones(2)}, [jnp.ones(1), jnp.ones(3)]]
    assert jaxft.paths(params) == ["0.kernel", "1.0", "1.1"]
    assert jaxft.label(params, {"1.1": "x"}) == [{"kernel": "frozen"}, ["frozen", "x"]]


def test_paths_of_nnx_param_that_holds_a_tree():
    state = nnx.state(nnx.Dict(lora=nnx.Param({"a": jnp.ones(1), "b": [jnp.ones(2)]})))
    assert jaxft.paths(state) == ["lora.a", "lora.b.0"]
    labels = jaxft.label(state, {"lora.b": "x"})
    assert jax.tree.leaves(labels) == ["frozen", "x"]
    assert jax.tree.structure(labels) == jax.tree.structure(state)


def test_partition_goes_by_position_where_haiku_modules_share_a_path():
    import haiku as hk

    class Twice(hk.Module):
        def __init__(self):
            super().__init__(name="net")
            self.first = hk.Linear(3, name="linear")  # net/~/linear

        def __call__(self, x):
            return hk.Linear(2, name="linear")(self.first(x))  # net/linear

    params = hk.transform(lambda x: Twice()(x)).init(jax.random.key(0), X)
    labels = {"net/linear": {"w": "frozen", "b": "frozen"}}
    labels["net/~/linear"] = {"w": "head", "b": "head"}
    trainable, frozen = jaxft.partition(params, labels)
    assert trainable == {**params, "net/linear": {"w": None, "b": None}}
    assert frozen == {**params, "net/~/linear": {"w": None, "b": None}}


def test_paths_of_registered_container_with_string_keys():
    @jax.tree_util.register_pytree_with_keys_class
    class Pair(list):
        def tree_flatten_with_keys(self):
            return (("left", self[0]), ("right", self[1])), None

        @classmethod
        def tree_unflatten(cls, _, children):
            return cls(children)

    assert jaxft.paths(Pair([jnp.ones(1), {"w": jnp.ones(1)}])) == ["left", "right.w"]


@pytest.mark.parametrize("wrapped", [False, True], ids=["labels", "MultiSteps"])
@pytest.mark.parametrize("state_params", ["whole", "half"])
@pytest.mark.parametrize("gradients", ["whole", "half"])
def test_train_state_accepts_all_parameters_and_the_trainable_half(
    wrapped, state_params, gradients
):
    params = LinenNet().init(jax.random.key(0), X)["params"]
    labels = jaxft.label(params, {"head": "head"})
    tx = jaxft.multi_transform({"head": optax.adam(0.1)}, labels)
    if wrapped:
        tx = jaxft.trainable_only(optax.MultiSteps(tx, 1), labels)
    trainable, frozen = jaxft.partition(params, labels)

    def loss(params):
        return jnp.sum(LinenNet().apply({"params": params}, X) ** 2)

    initial = params if state_params == "whole" else trainable
    state = TrainState.create(apply_fn=None, params=initial, tx=tx)
    expected, opt_state = trainable, optax.adam(0.1).init(trainable)
    for _ in range(2):
        grads = jax.grad(loss)(filled(state.params, params))
        state = state.apply_gradients(
            grads=grads if gradients == "whole" else jaxft.partition(grads, labels)[0]
        )
        grads = jax.grad(lambda half: loss(jaxft.combine(half, frozen)))(expected)
        updates, opt_state = optax.adam(0.1).update(grads, opt_state)
        expected = optax.apply_updates(expected, updates)
    assert jax.tree.structure(state.params) == jax.tree.structure(initial)
    after = filled(state.params, params)
    jax.tree.map(np.testing.assert_array_equal, after["body"], params["body"])
    jax.tree.map(np.testing.assert_allclose, after["head"], expected["head"])


@pytest.mark.parametrize("labelled", ["whole", "arrays"])
@pytest.mark.parametrize("rules", [{"head": "x"}, {"*": "x"}], ids=["head", "all"])
def test_equinox_filter_grad_with_all_gradients(labelled, rules, networks):
    import equinox as eqx

    net, apply = networks["equinox, whole"]
    labels = jaxft.label(net if labelled == "whole" else eqx.filter(net, eqx.is_array), rules)
    tx = jaxft.multi_transform({"x": optax.adam(0.1)}, labels)
    results = []
    for initial in (net, eqx.filter(net, eqx.is_array)):
        after, opt_state = net, tx.init(initial)
        for _ in range(2):
            _, grads = eqx.filter_value_and_grad(lambda net: jnp.sum(apply(net) ** 2))(after)
            updates, opt_state = tx.update(grads, opt_state, eqx.filter(after, eqx.is_array))
            after = eqx.apply_updates(after, updates)
        results.append(after)
    trainable, frozen = jaxft.partition(net, labels)
    opt_state = tx.init(trainable)
    for _ in range(2):
        _, grads = eqx.filter_value_and_grad(
            lambda half, frozen=frozen: jnp.sum(apply(jaxft.combine(half, frozen)) ** 2)
        )(trainable)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        trainable = eqx.apply_updates(trainable, updates)
    results.append(jaxft.combine(trainable, frozen))
    for after in results:
        assert after.activation is net.activation
        assert jax.tree.structure(after) == jax.tree.structure(net)
        arrays = [eqx.filter(tree, eqx.is_array) for tree in (after, results[0])]
        jax.tree.map(np.testing.assert_array_equal, *arrays)
        assert np.array_equal(after.body.weight, net.body.weight) == ("head" in rules)
        assert not np.array_equal(after.head.weight, net.head.weight)


def test_label_freezes_leaves_that_are_no_arrays_of_floats():
    params = {
        "function": jnp.tanh,
        "number": 0.5,  # a dropout rate of Equinox
        "steps": jnp.zeros((), jnp.int32),
        "key": jax.random.key(0),
        "w": jnp.ones(2),
        "half": jnp.ones(2, jnp.bfloat16),
    }
    labels = jaxft.label(params, {"*": "x"})
    assert [name for name in params if labels[name] == "x"] == ["w", "half"]
    assert jaxft.label(params, {"w": "x"}, default="rest")["function"] == "frozen"
    (plan,) = jaxft.plan(Stage("all", {"*": 0.1}, 1), params)
    plan.transform(Adam()).init(params)
    trainable, frozen = jaxft.partition(params, plan.labels)
    assert sorted(jaxft.paths(trainable)) == ["half", "w"]
    assert jaxft.combine(trainable, frozen) == params
    message = r"'function' matches only leaves that never train: function \(PjitFunction\)"
    with pytest.raises(PatternError, match=message):
        jaxft.label(params, {"function": "x"})


def test_multi_transform_matches_labels_by_path_where_containers_differ(networks):
    params, _ = networks["linen"]
    labels = jaxft.label(params, {"head": "head"})
    tx = jaxft.multi_transform({"head": optax.adam(0.1)}, labels)
    states = [tx.init(tree) for tree in (params, freeze(params))]
    assert jax.tree.map(jnp.shape, states[0]).inner_states.keys() == {"head", "frozen"}
    assert jaxft.paths(states[0]) == jaxft.paths(states[1])
    with pytest.raises(LabelError, match=r"labels of no parameter: head\.bias, head\.kernel"):
        tx.init({"body": params["body"]})
    with pytest.raises(LabelError, match=r"without a label: neck"):
        tx.init({**params, "neck": jnp.ones(1)})


def test_labels_are_refused_where_leaves_share_a_path_and_containers_differ():
    params = {"net/linear": {"w": jnp.ones(1)}, "net/~/linear": {"w": jnp.ones(2)}}
    labels = jaxft.label(params, {"net": "x"})
    with pytest.raises(LabelError, match=r"several leaves share the path net\.linear\.w"):
        jaxft.partition(freeze(params), labels)
