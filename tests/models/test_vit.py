"""Vision transformers: names and options of timm's, initialisation, blocks and dtypes."""

import json
import math
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_vit

import jaxft
from jaxft.models import create, names
from jaxft.models.networks.vit import ViT
from jaxft.models.resize_pos_embed import resize_pos_embed
from jaxft.strategies import layer_decay
from jaxft.weights.key_maps import torch_tensors

KEY = jax.random.key(0)
NETWORKS = tuple(name for name in names() if create(name).module is ViT)
SMALL = {"width": 48, "depth": 2, "num_heads": 3, "image_size": 32, "num_classes": 5}
KINDS = {
    "token": create("vit_tiny_patch16_224", **SMALL),
    "registers": create("vit_small_patch14_reg4_dinov2", **SMALL | {"image_size": 28}),
    "map": create("vit_base_patch16_siglip_224", **SMALL),
    "average": create("vit_medium_patch16_gap_256", **SMALL),
    "fc_norm": create("vit_wee_patch16_reg1_gap_256", **SMALL),
    "pre_norm": create("vit_base_patch16_clip_quickgelu_224", **SMALL),
}


@cache
def recorded(key):
    with np.load(record_vit.GOLDEN) as golden:
        return json.loads(golden[key].item()) if golden[key].ndim == 0 else golden[key]


def paths(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(key.key for key in path): leaf for path, leaf in leaves}


def by_torch_name(model, tree):
    """Returns the leaves of a tree like the parameters, by torch's names."""
    targets = torch_tensors(*jax.eval_shape(model.init, KEY))[0]
    pairs = zip(jax.tree.leaves(targets), jax.tree.leaves(tree), strict=True)
    return {target.name: leaf for target, leaf in pairs}


def test_every_network_is_recorded():
    assert {*NETWORKS} == {*recorded("networks")}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_tensors_options_and_preprocessing_equal_timms(name):
    model = create(name)
    config, images = model.config, model.preprocessing
    tensors = jax.tree.leaves(torch_tensors(*jax.eval_shape(model.init, KEY)))
    assert recorded("networks")[name] == [
        record_vit.checksum({t.name: t.shape for t in tensors}),
        *(config.num_heads, config.activation, config.eps, config.pool, config.layer_scale),
        *(images.image_size, images.resize_size, images.resize_mode == "squash"),
        *(images.interpolation, [*images.mean], [*images.std]),
    ]
    assert images.image_size == model.image_size


@pytest.mark.parametrize(("old", "new"), record_vit.GRIDS)
def test_resize_pos_embed_equals_timms_bit_for_bit(old, new):
    expected = recorded(f"positions_{old}_{new}")
    resized = resize_pos_embed(record_vit.positions(old), expected.shape, 1)
    np.testing.assert_array_equal(resized, expected)
    assert resized.dtype == np.float32


@pytest.mark.parametrize(
    ("old", "new", "num_prefix_tokens"),
    [((1, 6, 3), (1, 5, 3), 1), ((1, 5, 3), (1, 6, 3), 1), ((1, 5, 3), (1, 10, 4), 1),
     ((1, 1, 3), (1, 5, 3), 1), ((5, 3), (10, 3), 1)],
)  # fmt: skip
def test_resize_pos_embed_errors(old, new, num_prefix_tokens):
    with pytest.raises(ValueError, match="cannot resize"):
        resize_pos_embed(np.zeros(old), new, num_prefix_tokens)


@pytest.mark.slow
@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
def test_blocks_one_by_one_equal_the_whole_network(model):
    params, stats = model.init(KEY)
    x = images = jax.random.normal(KEY, (3, model.image_size, model.image_size, 3))
    run = partial(model.apply, params, stats, norms="running")
    for block in model.blocks:
        x, _ = run(x, first=block, last=block)
        if block == "norm":
            assert x.shape == (3, 48)
    np.testing.assert_allclose(x, run(images)[0], atol=1e-6)
    assert x.shape == (3, 5)


def test_layer_decay_gives_the_learning_rates_of_timm():
    model = create("vit_tiny_patch16_224")
    *blocks, norm, head = model.blocks[1:]
    order = ["*", *blocks[:-1], (blocks[-1], norm), head]
    (stage,) = layer_decay(order, 1.0, record_vit.DECAY, epochs=1)
    labels = jaxft.label(
        jax.eval_shape(model.init, KEY)[0], {p: str(lr) for p, lr in stage.train.items()}
    )
    lrs = {name: float(lr) for name, lr in by_torch_name(model, labels).items()}
    assert lrs == pytest.approx(recorded("scales"))


@pytest.mark.slow
def test_initialisation_is_timms():
    model = create("vit_tiny_patch16_224", depth=1, num_classes=1000, layer_scale=1e-5)
    params = paths(model.init(KEY)[0])
    bound = 1 / math.sqrt(3 * 16**2)
    for path, array in params.items():
        match path.split("."):
            case [*_, "qkv" | "proj" | "fc1" | "fc2" | "head", "kernel"] if array.ndim == 2:
                assert float(array.std()) == pytest.approx(0.02, rel=0.02), path
            case ["pos_embed"]:
                assert float(array.std()) == pytest.approx(0.02, rel=0.02)
            case ["cls_token"]:
                assert 0 < float(abs(array).max()) < 1e-5
            case ["patch_embed", *_]:
                assert 0.95 * bound < float(abs(array).max()) <= bound, path
            case [*_, "gamma"]:
                np.testing.assert_array_equal(array, np.float32(1e-5))
            case [*_, "scale"]:
                np.testing.assert_array_equal(array, 1)
            case [*_, "bias"]:
                np.testing.assert_array_equal(array, 0)
            case _:
                raise AssertionError(path)


def test_drop_path_rates_grow_linearly_from_zero():
    model = create("vit_tiny_patch16_224", **SMALL | {"depth": 5}, drop_path=0.4)
    rates = [block.drop_path.rate for block in model._build(KEY).blocks]
    np.testing.assert_allclose(rates, [0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.slow
def test_drop_path_and_dropout_are_drawn_for_each_branch_and_example():
    model = create("vit_tiny_patch16_224", **SMALL, drop_path=0.5)
    params, stats = model.init(KEY)
    x = jax.random.normal(KEY, (64, 5, 48))
    run = partial(model.apply, params, stats, norms="running", first="blocks.1", last="blocks.1")
    changed = np.abs(run(x, key=KEY)[0] - x).max((1, 2)) > 0
    assert 0.6 < changed.mean() < 0.9  # both branches are dropped in a quarter of the examples


@pytest.mark.slow
@pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
def test_bfloat16_computes_all_blocks_before_the_head(model):
    options = {**SMALL, "image_size": model.image_size}
    model = create(model.name, **options, dtype="bfloat16")
    params, stats = model.init(KEY)
    images = jax.random.normal(KEY, (2, model.image_size, model.image_size, 3))
    for block in model.blocks:
        output, _ = model.apply(params, stats, images, norms="running", last=block)
        assert output.dtype == (jnp.float32 if block == "head" else jnp.bfloat16), block
    exact, _ = create(model.name, **options).apply(params, stats, images, norms="running")
    np.testing.assert_allclose(output, exact, atol=0.05 * float(jnp.abs(exact).max()))
