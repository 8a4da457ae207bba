"""EfficientNet and MobileNetV3: blocks, dtypes, rates and initial values.

test_timm.py compares outputs with timm's.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models import create
from jaxft.models.layers import Rngs
from jaxft.models.networks.efficientnet import (
    EfficientNet,
    InvertedResidual,
    hard_sigmoid,
    hard_swish,
)

NAMES = ("efficientnet_b0", "mobilenetv3_small_050")
WIDTHS = {"efficientnet_b0": (32, 16, 1280), "mobilenetv3_small_050": (16, 8, 1024)}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_efficientnet_blocks_compute_in_bfloat16_up_to_the_features(name):
    model = create(name, num_classes=2, binary=True, dtype="bfloat16")
    params, stats = jax.eval_shape(model.init, jax.random.key(0))
    x, results = jax.ShapeDtypeStruct((2, 64, 64, 3), jnp.float32), {}
    for block in model.blocks:
        run = partial(model.apply, norms="batch", first=block, last=block)
        x, new = jax.eval_shape(run, params, stats, x)
        results[block] = (x.shape, x.dtype)
    stem, first, features = WIDTHS[name]
    side = 32 if name == "efficientnet_b0" else 16
    assert results["stem"] == ((2, 32, 32, stem), jnp.bfloat16)
    assert results["blocks.0"] == ((2, side, side, first), jnp.bfloat16)
    assert results["conv_head"] == ((2, features), jnp.bfloat16)
    assert results["head"] == ((2, 2), jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(new)} == {jnp.dtype("float32")}


def test_efficientnet_drop_path_grows_by_blocks_as_in_timm():
    config = create("efficientnet_b0", drop_path=0.2).config

    def rates():
        network = EfficientNet(config, rngs=Rngs(jax.random.key(0)))
        return [block.drop_path.rate for stage in network.blocks for block in stage]

    found = []
    jax.eval_shape(lambda: found.extend(rates()))
    assert found == pytest.approx([0.2 * i / 16 for i in range(16)])


def test_efficientnet_initialisation_equals_timms():
    config = create("efficientnet_b0").config
    (block,) = config.stages[5]
    layer = InvertedResidual(112, 192, 2, 0.0, block, config, Rngs(jax.random.key(0)))
    assert float(layer.conv_dw.kernel[...].std()) == pytest.approx((2 / 25) ** 0.5, rel=0.05)
    assert float(layer.conv_pw.kernel[...].std()) == pytest.approx((2 / 672) ** 0.5, rel=0.05)
    assert not layer.se.conv_expand.bias[...].any()


def test_hard_activations():
    x = jnp.array([-4.0, -3.0, -1.0, 0.0, 1.0, 3.0, 4.0])
    np.testing.assert_allclose(hard_sigmoid(x), [0, 0, 1 / 3, 1 / 2, 2 / 3, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(hard_swish(x), [0, 0, -1 / 3, 0, 2 / 3, 3, 4], rtol=1e-6)
