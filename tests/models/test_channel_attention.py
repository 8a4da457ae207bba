"""Channel attention: shapes, values and initial values; test_timm.py compares whole networks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.channel_attention import EfficientChannelAttention, SqueezeExcite, build_attention
from jaxft.models.context import Context
from jaxft.models.layers import Rngs

CONTEXT = Context("running")


def rngs():
    return Rngs(jax.random.key(0))


def images(c, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (2, 3, 3, c), dtype)


@pytest.mark.parametrize(("c", "hidden"), [(64, 8), (256, 16), (312, 16), (2048, 128)])
def test_squeeze_excite_reduces_channels_to_a_multiple_of_eight(c, hidden):
    assert build_attention("se", c, rngs()).fc1.kernel.shape == (1, 1, c, hidden)


@pytest.mark.parametrize(("c", "size"), [(8, 3), (64, 3), (256, 5), (1024, 5), (2048, 7)])
def test_efficient_channel_attention_kernel_grows_with_channels(c, size):
    assert EfficientChannelAttention(c, rngs=rngs()).conv.kernel.shape == (size, 1, 1)


def test_efficient_channel_attention_convolves_the_means():
    layer, x = EfficientChannelAttention(16, rngs=rngs()), images(16)
    kernel = np.asarray(layer.conv.kernel[:, 0, 0])[::-1]
    means = np.asarray(x.mean((1, 2)))
    scores = np.array([np.convolve(row, kernel, "same") for row in means])
    expected = x / (1 + np.exp(-scores))[:, None, None]
    np.testing.assert_allclose(layer(x, CONTEXT), expected, rtol=1e-5, atol=1e-6)


def test_squeeze_excite_scales_by_the_sigmoid_of_the_last_bias():
    layer, x = SqueezeExcite(8, 4, rngs=rngs()), images(8)
    layer.fc2.kernel[...] = jnp.zeros_like(layer.fc2.kernel[...])
    expected = x * jax.nn.sigmoid(layer.fc2.bias[...])
    np.testing.assert_allclose(layer(x, CONTEXT), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["se", "eca"])
def test_attention_keeps_the_dtype_of_the_images(kind):
    x = images(64, jnp.bfloat16)
    assert build_attention(kind, 64, rngs())(x, CONTEXT).dtype == jnp.bfloat16


def test_attention_is_optional():
    x = images(64)
    assert build_attention(None, 64, rngs())(x, CONTEXT) is x


def test_squeeze_excite_initial_values():
    layer = SqueezeExcite(1024, 256, rngs=rngs())
    assert float(layer.fc1.kernel[...].std()) == pytest.approx((2 / 256) ** 0.5, rel=0.02)
    assert float(layer.fc1.bias[...].max()) == pytest.approx(1 / 32, rel=0.05)
    assert not SqueezeExcite(64, 8, zero_bias=True, rngs=rngs()).fc1.bias[...].any()
