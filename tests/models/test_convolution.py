"""Every form of a convolution equals XLA's, gradients included."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.models.convolution import convolve, dense_conv, xla_conv


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
        (2, 8, 12, 12, 12),
        (3, 1, 2, 2, 2),
    ],
)
def test_convolve_and_its_gradients_equal_xlas(size, stride, b, w, c_in, groups, c_out):
    x = np.random.default_rng(0).normal(size=(b, 7, w, c_in)).astype(np.float32)
    # Outputs are of order one, so that the gradient of the loss does not magnify rounding errors.
    kernel = np.random.default_rng(1).normal(size=(size, size, c_in // groups, c_out))
    kernel = jnp.asarray(kernel / np.sqrt(size * size * c_in / groups), jnp.float32)

    def gradients_and_output(conv):
        def loss(x, kernel):
            y = conv(x, kernel, stride, groups)
            return jnp.sin(y).sum(), y

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(jnp.asarray(x), kernel)

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
    jax.tree.map(close, gradients_and_output(convolve), gradients_and_output(xla_conv))


@pytest.mark.parametrize("groups", [16, 64])
def test_grouped_convolutions_are_as_accurate_as_xla_in_bfloat16(groups):
    shapes = (2, 9, 9, 64), (3, 3, 64 // groups, 64), (2, 9, 9, 64)
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]

    def output_and_gradients(conv, dtype):
        x, kernel, grad_y = (array.astype(dtype) for array in arrays)
        y, vjp = jax.vjp(partial(conv, stride=1, groups=groups), x, kernel)
        return [y, *vjp(grad_y)] if groups == 64 else [y]

    exact = output_and_gradients(xla_conv, jnp.float32)

    def errors(conv):
        results = output_and_gradients(conv, jnp.bfloat16)
        assert {y.dtype for y in results} == {jnp.dtype(jnp.bfloat16)}
        return [float(jnp.square(x - y).mean()) for x, y in zip(results, exact, strict=True)]

    for error, xla_error in zip(errors(convolve), errors(xla_conv), strict=True):
        assert error < 1.2 * xla_error


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [12, 72])
def test_dense_conv_gradients_in_a_loop_have_the_fast_axis_order(stride, channels):
    def axis_orders(conv):
        def gradients(sums, x):
            new = jax.grad(lambda x, k: jnp.square(conv(x, k)).sum(), (0, 1))(x, kernel)
            return jax.tree.map(jnp.add, sums, new), None

        kernel = jnp.ones((3, 3, channels, channels))
        xs = jnp.zeros((3, 2, 7, 8, channels))
        loop = jax.jit(lambda xs: jax.lax.scan(gradients, (xs[0], kernel), xs)[0])
        return set(re.findall(r"dim_labels=(\S+?),? ", loop.lower(xs).compile().as_text()))

    fast = {"b01f_01io->b01f"}
    assert axis_orders(partial(dense_conv, stride=stride)) == fast
    assert axis_orders(partial(xla_conv, stride=stride, groups=1)) != fast
