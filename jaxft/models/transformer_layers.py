"""Layers of transformers, with timm's names, arithmetic and initialisation.

They compute in the dtype of their input, whatever the dtype of the parameters. Linear layers start
from a normal distribution with standard deviation 0.02 and zero biases.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.models.context import Context
from jaxft.models.layer_norm import LayerNorm
from jaxft.models.layers import Linear, Rngs, gelu

STD = 0.02
"""Standard deviation of the initial kernels."""

Activation = Literal["gelu", "gelu_tanh", "quick_gelu"]
"""`gelu`: exact. `gelu_tanh`: its approximation by tanh. `quick_gelu`: x sigmoid(1.702 x)."""

_ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "gelu": gelu,
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


class Dense(Linear):
    """A linear layer between other layers."""

    def __init__(self, c_in: int, c_out: int, *, bias: bool = True, rngs: Rngs):
        super().__init__(c_in, c_out, bias=bias, std=STD, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[... c_in]` to `[... c_out]`."""
        y = x @ self.kernel[...].astype(x.dtype)
        return y + self.bias[...].astype(x.dtype) if hasattr(self, "bias") else y


class LayerScale(nnx.Module):
    """Factors of the channels of a residual branch (Touvron et al. 2021, arXiv:2103.17239)."""

    def __init__(self, c: int, value: float):
        self.gamma = nnx.Param(jnp.full(c, value, jnp.float32))

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Scales an array `[... c]`."""
        return x * self.gamma[...].astype(x.dtype)


class Mlp(nnx.Module):
    """Two linear layers with an activation function between them."""

    def __init__(self, c: int, hidden: int, activation: Activation = "gelu", *, rngs: Rngs):
        self.fc1 = Dense(c, hidden, rngs=rngs)
        self.fc2 = Dense(hidden, c, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps `[... c]` to `[... c]`."""
        hidden = _ACTIVATIONS[self.activation](self.fc1(x, context.child("fc1")))
        return self.fc2(hidden, context.child("fc2"))


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Computes scaled dot-product attention; the softmax is in float32 or wider.

    Args:
      query: `[b q h d]`, of h heads.
      key: `[b k h d]`.
      value: `[b k h d]`.

    Returns:
      `[b q h d]`.
    """
    if query.dtype != jnp.float64:
        return jax.nn.dot_product_attention(query, key, value)
    # jax's softmax is in float32, also for float64.
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


class Attention(nnx.Module):
    """Multi-head self-attention (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, c: int, num_heads: int, *, qkv_bias: bool = True, rngs: Rngs):
        self.qkv = Dense(c, 3 * c, bias=qkv_bias, rngs=rngs)
        self.proj = Dense(c, c, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps tokens `[b n c]` to `[b n c]`."""
        b, n, c = x.shape
        qkv = self.qkv(x, context.child("qkv")).reshape(b, n, 3, self.num_heads, -1)
        y = attend(*(qkv[:, :, i] for i in range(3)))
        return self.proj(y.reshape(b, n, c), context.child("proj"))


class AttentionPool(nnx.Module):
    """Pools tokens by the attention of one learned query: timm's `AttentionPoolLatent`, SigLIP.

    Reference: Zhai et al. 2022 (arXiv:2106.04560), "MAP head".
    """

    def __init__(
        self,
        c: int,
        num_heads: int,
        hidden: int,
        activation: Activation = "gelu",
        eps: float = 1e-6,
        *,
        rngs: Rngs,
    ):
        normal = jax.random.truncated_normal(rngs.params(), -2, 2, (1, 1, c), jnp.float32)
        self.latent = nnx.Param(c**-0.5 * normal)
        self.q = Dense(c, c, rngs=rngs)
        self.kv = Dense(c, 2 * c, rngs=rngs)
        self.proj = Dense(c, c, rngs=rngs)
        self.norm = LayerNorm(c, eps)
        self.mlp = Mlp(c, hidden, activation, rngs=rngs)
        self.num_heads = num_heads

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps tokens `[b n c]` to `[b c]`."""
        b, n, c = x.shape
        query = self.q(self.latent[...].astype(x.dtype), context.child("q"))
        query = jnp.broadcast_to(query, (b, 1, c))
        query = query.reshape(b, 1, self.num_heads, -1)
        kv = self.kv(x, context.child("kv")).reshape(b, n, 2, self.num_heads, -1)
        y = self.proj(attend(query, kv[:, :, 0], kv[:, :, 1]).reshape(b, c), context)
        return y + self.mlp(self.norm(y, context.child("norm")), context.child("mlp"))
