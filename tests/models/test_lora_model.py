"""`LoraModel`: networks whose params hold adapters beside their kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from user_modules import Attention, Compact, TrainingArgument

import jaxft
from jaxft import RecipeError
from jaxft.models import NNX, Linen, Model, create
from jaxft.models.lora_model import (
    LoraModel,
    merged_params,
    split_adapters,
    with_lora,
    without_lora,
)
from jaxft.train.frozen_prefix import block_labels, inert_blocks

RESNET = create("cifar_resnet8", num_classes=5)
NETWORKS = {
    "resnet": (RESNET, {"layer*": 2, "conv1": 1}, 7),
    "linen": (Linen(Compact(), shape=(8, 8, 3), head="head"), {"**": 2}, 2),
    "nnx": (NNX(TrainingArgument, shape=(8, 8, 3), head="fc"), {"conv": 3}, 1),
}
networks = pytest.mark.parametrize("name", NETWORKS)
IMAGES = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))


def init(model):
    return jax.jit(model.init)(jax.random.key(0))


def trained(model):
    """Params and stats with `lora_b` that change the outputs."""
    params, stats = init(model)

    def moved(path, leaf):
        return leaf + 0.1 if path[-1].key == "lora_b" else leaf

    return jax.tree_util.tree_map_with_path(moved, params), stats


def logits(model, params, stats, **how):
    return model.apply(params, stats, IMAGES, norms="running", **how)[0]


@pytest.mark.slow
@networks
def test_fresh_adapters_keep_params_and_outputs_of_the_network(name):
    network, ranks, count = NETWORKS[name]
    model = with_lora(network, ranks, None)
    assert isinstance(model, Model)
    params, stats = init(model)
    before, adapters = split_adapters(params)
    jax.tree.map(np.testing.assert_array_equal, (before, stats), init(network))
    assert len(adapters) == count
    assert not any(path.startswith(f"{network.head}.") for path in adapters)
    np.testing.assert_array_equal(logits(model, params, stats), logits(network, before, stats))


@pytest.mark.slow
@networks
def test_apply_merges_the_adapters(name):
    network, ranks, _ = NETWORKS[name]
    model = with_lora(network, ranks, 4.0)
    params, stats = trained(model)
    merged = jaxft.merge_lora(*split_adapters(params), alpha=4.0)
    adapted = logits(model, params, stats)
    np.testing.assert_array_equal(adapted, logits(network, merged, stats))
    assert np.abs(adapted - logits(network, split_adapters(params)[0], stats)).max() > 1e-3
    recipe = {"lora": ranks, "lora_alpha": 4.0}
    jax.tree.map(np.testing.assert_array_equal, merged, merged_params(params, recipe))


@networks
def test_fold_keeps_the_outputs_and_zeroes_lora_b(name):
    network, ranks, _ = NETWORKS[name]
    model = with_lora(network, ranks, None)
    params, stats = trained(model)
    folded = model.merge_and_reset(params)
    assert jax.tree.structure(folded) == jax.tree.structure(params)
    np.testing.assert_array_equal(logits(model, folded, stats), logits(model, params, stats))
    for path, adapter in split_adapters(folded)[1].items():
        assert not adapter["lora_b"].any(), path
        assert np.array_equal(adapter["lora_a"], split_adapters(params)[1][path]["lora_a"])


def test_adapters_belong_to_the_block_of_their_kernel():
    model = with_lora(RESNET, {"*": 1}, None)
    params, stats = init(model)
    blocks = block_labels(model, params)
    assert blocks["conv1"] == dict.fromkeys(("kernel", "lora_a", "lora_b"), "stem")
    assert blocks["layer2"]["0"]["conv1"]["lora_b"] == "layer2"
    labels = jaxft.label(params, {"layer3.**.lora_*": "adapters"})
    norms = dict.fromkeys({path.rpartition(".")[0] for path in jaxft.paths(stats)}, "running")
    inert, why = inert_blocks(model, (params, stats), labels, norms)
    assert (inert, why) == (("stem", "layer1", "layer2"), "layer3 trains")


def test_two_parts_of_an_adapted_network_compute_the_whole():
    model = with_lora(RESNET, {"layer*": 2}, None)
    params, stats = trained(model)
    features, _ = model.apply(params, stats, IMAGES, norms="running", last="layer2")
    rest, _ = model.apply(params, stats, features, norms="running", first="layer3")
    np.testing.assert_allclose(rest, logits(model, params, stats), rtol=1e-5)


def test_equal_models_compile_once():
    first, second = (with_lora(create("cifar_resnet8", num_classes=5), {"*": 2}, 4.0) for _ in "ab")
    assert first == second
    assert hash(first) == hash(second)
    assert without_lora(first) == without_lora(RESNET) == with_lora(RESNET, {}, None) == RESNET


ATTENTION = Linen(Attention(), shape=(8, 8, 3), head="head")


@pytest.mark.parametrize(
    ("network", "ranks", "alpha", "message"),
    [
        (RESNET, {"layer4": 2}, None, "Did you mean 'layer3'"),
        (RESNET, {"fc": 2}, None, "outside the head, 'fc', which trains as a whole"),
        (RESNET, {"layer1": 99}, None, r"rank of layer1.0.conv1.kernel .* is 99; .* from 1 to 16"),
        (RESNET, {"layer1": 2}, 0.0, "lora_alpha is 0.0; it must be positive and finite"),
        (ATTENTION, {"**": 2}, None, r"MultiHeadDotProductAttention_0.key.kernel .* has 3 axes"),
    ],
)
def test_lora_model_rejects(network, ranks, alpha, message):
    with pytest.raises(RecipeError, match=message):
        with_lora(network, ranks, alpha)


def test_lora_model_rejects_a_network_with_adapters():
    model = with_lora(RESNET, {"layer1": 2}, None)
    with pytest.raises(RecipeError, match="has parameters called lora_a or lora_b already"):
        LoraModel(model, (("layer2", 2),))


@pytest.mark.slow
def test_adapters_do_not_depend_on_other_patterns():
    one, two = (with_lora(RESNET, r, None) for r in ({"layer1": 2}, {"layer3": 1, "layer1": 2}))
    adapters = [split_adapters(init(model)[0])[1] for model in (one, two)]
    for path, adapter in adapters[0].items():
        assert jnp.array_equal(adapter["lora_a"], adapters[1][path]["lora_a"])
