"""ConvNeXt beyond its recorded outputs: stochastic depth, gradients, dtypes and initial values."""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import record_golden
import record_timm

from jaxft.models import create, names
from jaxft.models.context import Context
from jaxft.models.layer_norm import LayerNorm
from jaxft.models.layers import PatchConv, Rngs, gelu
from jaxft.models.networks.convnext import (
    ConvNeXt,
    ConvNeXtConfig,
    GlobalResponseNorm,
)
from jaxft.models.nnx_adapter import NNXModel, init_shapes
from jaxft.weights.key_maps import torch_tensors

CONFIG = ConvNeXtConfig((2, 1), (8, 16), num_classes=3)
V2 = replace(CONFIG, global_response_norm=True)
BEFORE_POOL = replace(CONFIG, norm_before_pool=True)
CONTEXT = Context("running")


def network(config):
    return NNXModel("small", ConvNeXt, config)


def start(config):
    """Returns the compiled `apply`, random params, and stats."""
    model = network(config)
    rng, (params, stats) = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(0, 0.3, x.shape).astype(x.dtype), params)
    apply = jax.jit(partial(model.apply, norms="running"), static_argnames=("first", "last"))
    return apply, params, stats


def test_drop_path_rates_grow_linearly_over_all_blocks():
    config = ConvNeXtConfig((1, 3, 1), (8, 16, 32), drop_path=0.4)
    stages = ConvNeXt(config, rngs=Rngs(jax.random.key(0))).stages
    rates = [[block.drop_path.rate for block in stage.blocks] for stage in stages]
    assert [len(stage) for stage in rates] == [1, 3, 1]
    np.testing.assert_allclose([rate for stage in rates for rate in stage], [0, 0.1, 0.2, 0.3, 0.4])


@pytest.mark.slow
def test_drop_path_and_dropout_need_a_key():
    apply, params, stats = start(replace(CONFIG, drop_path=0.9, dropout=0.5))
    x = jnp.ones((4, 16, 16, 3))
    plain = start(CONFIG)[0](params, stats, x)[0]
    np.testing.assert_array_equal(apply(params, stats, x)[0], plain)
    features = apply(params, stats, x, last="head.norm")[0]
    dropped = apply(params, stats, x, last="head.norm", key=jax.random.key(1))[0]
    assert np.abs(dropped - features).max() > 0.01  # stochastic depth
    head = partial(apply, params, stats, features, first="head")
    assert np.abs(head(key=jax.random.key(1))[0] - head()[0]).max() > 0.01  # dropout


@pytest.mark.slow
@pytest.mark.parametrize("config", [CONFIG, V2, BEFORE_POOL], ids=["v1", "v2", "norm before pool"])
def test_blocks_in_parts_give_the_logits_of_the_whole(config):
    apply, params, stats = start(config)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 17, 19, 3)), jnp.float32)
    logits, _ = apply(params, stats, x)
    y = x
    for block in config.blocks[:-1]:
        y, _ = apply(params, stats, y, first=block, last=block)
    assert y.shape == (2, 16)
    y, _ = apply(params, stats, y, first="head")
    np.testing.assert_allclose(y, logits, rtol=0, atol=1e-5 * np.abs(logits).max())


@pytest.mark.slow
def test_bfloat16_changes_the_compute_dtype_alone():
    apply, params, stats = start(replace(CONFIG, dtype="bfloat16"))
    x = jnp.ones((2, 16, 16, 3))
    features, _ = apply(params, stats, x, last="head.norm")
    logits, _ = apply(params, stats, x)
    assert (features.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.slow
@pytest.mark.skipif(not record_timm.timm_is_here(), reason="needs the torch extra")
def test_all_variants_have_timms_tensors_and_preprocessing():
    import torch

    record_golden.import_torchvision()  # timm needs it
    import timm

    variants = [name for name in names() if name.startswith("convnext")]
    assert len(variants) == 23
    for name in variants:
        with torch.device("meta"):
            state = timm.create_model(name, num_classes=3).state_dict()
        model = create(name, num_classes=3)
        targets = jax.tree.leaves(torch_tensors(*init_shapes(model)))
        assert {t.name: t.shape for t in targets} == {n: tuple(x.shape) for n, x in state.items()}
        config, ours = timm.get_pretrained_cfg(name), model.preprocessing
        size = config.input_size[-1]
        assert ours.image_size == size
        assert ours.resize_size == math.floor(size / config.crop_pct)
        assert (ours.interpolation, ours.mean, ours.std) == (
            config.interpolation, config.mean, config.std,
        )  # fmt: skip
        assert (ours.resize_mode == "squash") == (config.crop_mode == "squash")


@pytest.mark.slow
def test_initial_values_are_timms():
    model = network(ConvNeXtConfig((1, 1), (64, 128), num_classes=9))
    params, _ = jax.jit(model.init)(jax.random.key(0))
    leaves = jax.tree_util.tree_leaves_with_path(params)
    values = {"bias": 0, "scale": 1, "gamma": np.float32(1e-6)}
    for path, leaf in leaves:
        if path[-1].key == "kernel":
            assert float(leaf.std()) == pytest.approx(0.02, rel=0.1)
        else:
            np.testing.assert_array_equal(leaf, values[path[-1].key])


def test_global_response_norm_of_a_channel_of_zeros_has_a_gradient():
    layer = GlobalResponseNorm(3)
    layer.scale[...] = jnp.ones(3)
    x = jnp.zeros((1, 1, 1, 3)).at[..., 0].set(2.0)
    gradient = jax.grad(lambda x: layer(x, CONTEXT).sum())(x)
    np.testing.assert_allclose(gradient[0, 0, 0], [4, 1, 1], rtol=1e-5)


@pytest.mark.parametrize("function", [LayerNorm(64), gelu], ids=["layer_norm", "gelu"])
def test_bfloat16_result_is_the_rounded_float32_result(function):
    x = jnp.asarray(np.random.default_rng(0).normal(3, 2, (5, 64)), jnp.bfloat16)
    call = (lambda x: function(x, CONTEXT)) if isinstance(function, LayerNorm) else function
    np.testing.assert_array_equal(call(x), call(x.astype(jnp.float32)).astype(jnp.bfloat16))


def test_patch_conv_equals_a_strided_convolution_and_drops_the_rest():
    layer = PatchConv(3, 5, 4, bias=False, rngs=Rngs(jax.random.key(0)))
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 14, 9, 3)), jnp.float32)
    expected = jax.lax.conv_general_dilated(
        x, layer.kernel[...], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    y = layer(x, CONTEXT)
    assert y.shape == (2, 3, 2, 5)
    np.testing.assert_allclose(y, expected, atol=1e-6)
