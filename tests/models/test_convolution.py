"""Other ways to compute a convolution are XLA's own, gradients included."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.convolution import by_taps, by_xla, convolve, dense


@pytest.mark.slow
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2), (5, 3)])
@pytest.mark.parametrize(
    ("b", "w", "c_in", "groups", "c_out"),
    [
        (2, 8, 12, 1, 8),
        (3, 8, 12, 1, 24),
        (2, 8, 12, 1, 72),
        (2, 8, 72, 1, 8),
        (2, 2, 72, 1, 72),
        (3, 1, 72, 1, 72),
        (2, 8, 12, 3, 24),
        (2, 8, 12, 12, 24),
    ],
)
def test_convolutions_and_their_gradients_are_xlas(size, stride, b, w, c_in, groups, c_out):
    x = np.random.default_rng(0).normal(size=(b, 7, w, c_in)).astype(np.float32)
    # Outputs of order one, or the loss's gradient would magnify their rounding.
    kernel = np.random.default_rng(1).normal(size=(size, size, c_in // groups, c_out))
    kernel = jnp.asarray(kernel / np.sqrt(size * size * c_in / groups), jnp.float32)

    def outcome(convolution):
        def loss(x, kernel):
            y = convolution(x, kernel, stride, groups)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(jnp.asarray(x), kernel)

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, outcome(convolve), outcome(by_xla))


def test_by_taps_is_as_exact_in_bfloat16():
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 9, 9, 64)), rng.normal(size=(3, 3, 4, 64))
    exact = by_xla(jnp.asarray(x, jnp.float32), jnp.asarray(kernel, jnp.float32), 1, 16)

    def error(convolution):
        y = convolution(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kernel, jnp.bfloat16), 1, 16)
        assert y.dtype == jnp.bfloat16
        return float(jnp.sqrt(jnp.mean((y.astype(jnp.float32) - exact) ** 2)))

    assert error(by_taps) < 1.1 * error(by_xla)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [12, 72])
def test_gradients_in_a_loop_have_the_order_of_axes_that_is_fast_there(stride, channels):
    def orders(convolution):
        def gradients(sums, x):
            found = jax.grad(lambda x, k: jnp.square(convolution(x, k)).sum(), (0, 1))(x, kernel)
            return jax.tree.map(jnp.add, sums, found), None

        kernel = jnp.ones((3, 3, channels, channels))
        xs = jnp.zeros((3, 2, 7, 8, channels))
        loop = jax.jit(lambda xs: jax.lax.scan(gradients, (xs[0], kernel), xs)[0])
        return set(re.findall(r"dim_labels=(\S+?),? ", loop.lower(xs).compile().as_text()))

    fast = {"b01f_01io->b01f"}
    assert orders(partial(dense, stride=stride)) == fast
    assert orders(partial(by_xla, stride=stride, groups=1)) != fast
