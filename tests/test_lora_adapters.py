"""`jaxft.lora` and `jaxft.merge_lora` on the parameters of each framework."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_frameworks import LEAVES, frameworks, networks

import jaxft
from jaxft import LabelError, PatternError
from jaxft.labels import unflatten

networks = networks  # the fixture
KEY = jax.random.key(3)
CONV = {"conv": {"kernel": jnp.zeros((3, 3, 4, 6))}, "fc": {"kernel": jnp.zeros((6, 2))}}


def trained(adapters):
    """The adapters with other values, so that they change the kernels."""
    leaves, structure = jax.tree.flatten(adapters)
    keys = jax.random.split(KEY, len(leaves))
    drawn = [x + jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def kernel_path(name, layer):
    return f"{layer}.{LEAVES.get(name.split(',')[0], ('kernel',))[0]}"


@frameworks
def test_new_adapters_change_nothing_and_the_tree_stays(name, networks):
    params, apply = networks[name]
    adapters = jaxft.lora(params, {"body": 2, "head": 1}, key=KEY)
    merged = jaxft.merge_lora(params, adapters)
    assert jax.tree.map(jnp.shape, adapters) == {
        kernel_path(name, "body"): {"lora_a": (4, 2), "lora_b": (2, 3)},
        kernel_path(name, "head"): {"lora_a": (3, 1), "lora_b": (1, 2)},
    }
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_array_equal(apply(merged), apply(params))


@frameworks
def test_merged_kernel_is_the_sum_in_every_framework(name, networks):
    """The layer computes x @ kernel + alpha / r * (x @ a) @ b, whatever its order of axes."""
    params, _ = networks[name]
    adapters = trained(jaxft.lora(params, {"body": 2}, key=KEY))
    merged = jaxft.merge_lora(params, adapters, alpha=3.0)
    by_path, before = (
        dict(zip(jaxft.paths(tree), jax.tree.leaves(tree), strict=True))
        for tree in (merged, params)
    )
    path = kernel_path(name, "body")
    change = 1.5 * adapters[path]["lora_a"] @ adapters[path]["lora_b"]
    expected = before[path] + (change.T if name.startswith("equinox") else change)
    np.testing.assert_allclose(by_path[path], expected, rtol=1e-6)
    assert all(by_path[other] is before[other] for other in before if other != path)


@frameworks
def test_training_adapters_leaves_the_kernels_alone(name, networks):
    params, apply = networks[name]
    adapters = jaxft.lora(params, {"body": 2}, key=KEY)
    labels = jaxft.label({"lora": adapters}, {"lora": "adapters"})
    tx = jaxft.multi_transform({"adapters": optax.adam(0.1)}, labels)
    tree, state = {"lora": adapters}, tx.init({"lora": adapters})

    def loss(tree):
        return jnp.sum(apply(jaxft.merge_lora(params, tree["lora"])) ** 2)

    losses = []
    for _ in range(3):
        value, gradients = jax.value_and_grad(loss)(tree)
        updates, state = tx.update(gradients, state, tree)
        tree = optax.apply_updates(tree, updates)
        losses.append(value)
    assert losses[2] < losses[0]
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: (x != y).any(), adapters, tree["lora"])))


def test_merged_network_equals_adapted_layers():
    """A convolution with a merged kernel is the convolution plus the one of its adapter."""
    with jax.enable_x64(True):
        keys = jax.random.split(KEY, 3)
        params = {"conv": {"kernel": jax.random.normal(keys[0], (3, 3, 4, 6))}}
        x = jax.random.normal(keys[1], (2, 7, 7, 4))
        adapters = trained(jaxft.lora(params, {"conv": 2}, key=keys[2]))
        a, b = adapters["conv.kernel"].values()

        def conv(x, kernel):
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                x, kernel, (2, 2), "SAME", dimension_numbers=numbers
            )

        merged = jaxft.merge_lora(params, adapters, alpha=4)["conv"]["kernel"]
        adapted = conv(x, params["conv"]["kernel"]) + 4 / 2 * conv(x, a) @ b
        np.testing.assert_allclose(conv(x, merged), adapted, rtol=0, atol=1e-12)


def test_lora_initialises_as_peft():
    """PEFT draws A by kaiming_uniform_(a=sqrt(5)), which is uniform in +-1/sqrt(fan_in)."""
    adapters = jaxft.lora(CONV, {"*": 2}, key=KEY)
    for path, inputs in (("conv.kernel", 36), ("fc.kernel", 6)):
        a, b = adapters[path]["lora_a"], adapters[path]["lora_b"]
        assert not b.any()
        assert 0.8 < jnp.abs(a).max() * inputs**0.5 <= 1
    again = jaxft.lora(CONV, {"fc": 2, "conv": 2}, key=KEY)
    jax.tree.map(np.testing.assert_array_equal, adapters, again)  # whatever the patterns


def test_first_pattern_determines_the_rank():
    adapters = jaxft.lora(CONV, {"fc": 1, "*": 3}, key=KEY)
    ranks = {path: len(adapter["lora_b"]) for path, adapter in adapters.items()}
    assert ranks == {"conv.kernel": 3, "fc.kernel": 1}


def test_adapters_have_the_dtype_of_their_kernel():
    params = {"conv": {"kernel": jnp.ones((4, 4), jnp.bfloat16)}}
    adapters = trained(jaxft.lora(params, {"*": 2}, key=KEY))
    merged = jaxft.merge_lora(params, adapters, alpha=1)
    assert {x.dtype for x in jax.tree.leaves((adapters, merged))} == {jnp.dtype("bfloat16")}


BIASED = {
    "conv": {"kernel": jnp.zeros((3, 3, 4, 6)), "bias": jnp.zeros(6)},
    "w": jnp.zeros((2,) * 3),
}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"convs": 2}, "Did you mean 'conv'"),
        ({"conv.bias": 2}, "pattern 'conv.bias' selects no kernel, only conv.bias"),
        ({"*": 2}, r"w \[2, 2, 2\] has 3 axes; an adapter needs a dense kernel"),
        ({"conv": 0}, r"rank of conv.kernel \[3, 3, 4, 6\] is 0; it must be from 1 to 6"),
        ({"conv": 7}, r"rank of conv.kernel \[3, 3, 4, 6\] is 7; it must be from 1 to 6"),
        ({"conv": 2, "conv.kernel": 1}, "pattern 'conv.kernel' is never reached"),
    ],
)
def test_lora_rejects_patterns_and_ranks(ranks, message):
    with pytest.raises(PatternError, match=message):
        jaxft.lora(BIASED, ranks, key=KEY)


def test_lora_rejects_kernels_that_share_a_path():
    params = {"a/b": {"w": jnp.zeros((2, 2))}, "a/~/b": {"w": jnp.zeros((2, 2))}}
    with pytest.raises(LabelError, match=r"two kernels share the path 'a\.b\.w'"):
        jaxft.lora(params, {"a": 1}, key=KEY)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"fc": {"kernel": jnp.zeros((6, 2))}}, r"path 'conv.kernel', where params have none"),
        ({"conv": {"kernel": jnp.zeros((4, 6))}}, r"have one of shape \[4, 6\]"),
    ],
)
def test_merge_lora_rejects_other_parameters(params, message):
    adapters = jaxft.lora(CONV, {"conv": 2}, key=KEY)
    with pytest.raises(LabelError, match=message):
        jaxft.merge_lora(params, adapters)


def test_merge_lora_runs_within_jit_and_on_shapes():
    adapters = jax.eval_shape(lambda: jaxft.lora(CONV, {"*": 2}, key=KEY))
    merged = jax.eval_shape(jaxft.merge_lora, CONV, adapters)
    assert unflatten(CONV, jax.tree.leaves(merged)) == jax.eval_shape(lambda: CONV)
