"""`jaxpr_dependence`: which inputs reach which outputs."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from jaxft.jaxpr_dependence import dependence, mark


def scanned(x, y):
    """The first carry depends on `y` only through the second, after the second step."""

    def body(carry, y):
        return (carry[1], carry[1] + y), carry[0]

    return jax.lax.scan(body, (x, 0.0), jnp.stack([y, y, y]))


# function of (x, y), and the inputs that each output depends on
FUNCTIONS = {
    "arithmetic": (lambda x, y: (x + 1, x * y, y, 3.0), ["x", "xy", "y", ""]),
    "shape alone": (lambda x, y: jnp.zeros_like(x) + y, ["y"]),
    "jit": (jax.jit(lambda x, y: (jnp.sin(x), y)), ["x", "y"]),
    "checkpoint": (jax.checkpoint(lambda x, y: (y * 2, x)), ["y", "x"]),
    "custom_jvp": (lambda x, y: (nn.relu(x), jax.nn.silu(y)), ["x", "y"]),
    "carry": (scanned, ["xy", "y", "xy"]),
    "cond": (lambda x, y: jax.lax.cond(x > 0, lambda: (y, 1.0), lambda: (2 * y, 1.0)), ["xy"] * 2),
    "while": (lambda x, y: jax.lax.while_loop(lambda v: v < y, lambda v: v + 1, x), ["xy"]),
}


@pytest.mark.parametrize(("function", "expected"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_dependence_of_outputs(function, expected):
    outputs = dependence(jax.make_jaxpr(function)(1.0, 2.0)).outputs
    assert ["".join("xy"[i] for i in (0, 1) if bits >> i & 1) for bits in outputs] == expected


def test_dependence_treats_marks_as_inputs():
    def function(x, y):
        a = mark(x * y, "a")
        b = mark(a + 1, "b")
        jax.jit(lambda: mark(x, "nested"))()
        return b, a + y

    found = dependence(jax.make_jaxpr(function)(1.0, 2.0))
    assert found.marks == [("a", 0b11), ("b", 0b100)]
    assert found.outputs == [0b1000, 0b110]
