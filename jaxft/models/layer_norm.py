"""Layer normalisation with torch's arithmetic."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.context import Context


class LayerNorm(nnx.Module):
    """`torch.nn.LayerNorm` over the last axis.

    It computes in float32 or wider, whatever the dtype of its input: in half precision the mean and
    the variance would lose most of their digits.

    Reference: Ba et al. 2016 (arXiv:1607.06450).
    """

    def __init__(self, c: int, eps: float = 1e-6):
        self.scale = nnx.Param(jnp.ones(c, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(c, jnp.float32))
        self.eps = eps

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Normalises an array `[... c]`; the result has its dtype."""
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (y * self.scale[...] + self.bias[...]).astype(x.dtype)
