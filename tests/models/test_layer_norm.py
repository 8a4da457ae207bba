"""LayerNorm against its formula."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.context import Context
from jaxft.models.layer_norm import LayerNorm

X = np.random.default_rng(0).normal(3, 2, (2, 5, 6, 12))


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("shape", [(2, 12), (2, 5, 12), (2, 5, 6, 12)])
def test_layer_norm_normalises_the_last_axis(shape, eps):
    layer, x = LayerNorm(12, eps), X[(slice(None),) + (0,) * (4 - len(shape))]
    scale, bias = np.linspace(-1, 2, 12), np.linspace(3, 1, 12)
    layer.scale[...], layer.bias[...] = (jnp.asarray(v, jnp.float32) for v in (scale, bias))
    mean, var = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    y = layer(jnp.asarray(x, jnp.float32), Context("running"))
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + eps) * scale + bias, atol=1e-5)


def test_layer_norm_computes_in_float32_for_bfloat16():
    """In bfloat16, the mean of values around 100 would be off by up to 0.25."""
    layer, x = LayerNorm(12), jnp.asarray(X + 97, jnp.bfloat16)
    y = layer(x, Context("running"))
    assert y.dtype == jnp.bfloat16
    exact = layer(x.astype(jnp.float32), Context("running"))
    np.testing.assert_array_equal(y, exact.astype(jnp.bfloat16))
