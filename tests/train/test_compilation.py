"""Programs compiled ahead: their results, their errors, and waits that end early."""

import threading

import jax
import jax.numpy as jnp
import pytest

from jaxft.train.compiled_stage import flops
from jaxft.train.train_stages import InBackground


def test_ahead_returns_result_of_function():
    ahead = InBackground(lambda: jax.jit(lambda x: x + 1).lower(jnp.zeros(3)).compile())
    assert ahead.result()(jnp.zeros(3)).tolist() == [1, 1, 1]
    assert ahead.seconds > 0
    assert ahead.result() is ahead.result()


def test_ahead_raises_error_of_function_in_result():
    ahead = InBackground(lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ahead.result()


def test_ahead_wait_ends_by_exception_of_glance():
    hold = threading.Event()
    ahead = InBackground(hold.wait)

    def glance():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        ahead.result(glance)
    hold.set()
    assert ahead.result() is True


def test_ahead_computes_in_precision_of_caller():
    for wide in (False, True):
        with jax.enable_x64(wide):
            ahead = InBackground(lambda: jnp.zeros(1, float).dtype)
        assert ahead.result() == ("float64" if wide else "float32")


def test_flops_of_matrix_product():
    a = jnp.zeros((8, 16))
    compiled = jax.jit(lambda a, b: a @ b).lower(a, a.T).compile()
    assert flops(compiled) == 2 * 8 * 16 * 8
