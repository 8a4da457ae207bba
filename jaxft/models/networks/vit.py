"""Vision transformers in Flax NNX, with the names and the arithmetic of timm.

References: Dosovitskiy et al. 2020 (arXiv:2010.11929) and `timm.models.vision_transformer`.
Parameters are drawn in float32, whatever the compute dtype.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxft.errors import RecipeError
from jaxft.models.context import Context
from jaxft.models.layer_norm import LayerNorm
from jaxft.models.layers import Dropout, Identity, PatchConv, Rngs, Sequential
from jaxft.models.network_config import NetworkConfig, build_head, drop_path_rates
from jaxft.models.transformer_layers import (
    STD,
    Activation,
    Attention,
    AttentionPool,
    LayerScale,
    Mlp,
)


@dataclass(frozen=True, kw_only=True)
class ViTConfig(NetworkConfig):
    """Configuration of a `ViT`.

    Raises:
      RecipeError: if an option is wrong.
    """

    image_size: int = 224
    """Side of the images in pixels, a multiple of `patch_size`."""
    patch_size: int = 16
    """Side of the patches in pixels."""
    width: int
    """Number of channels."""
    depth: int
    """Number of blocks of attention and MLP."""
    num_heads: int
    """Number of attention heads."""
    mlp_ratio: float = 4.0
    """Hidden channels of an MLP, in multiples of `width`."""
    activation: Activation = "gelu"
    """Activation function of the MLPs."""
    pool: Literal["token", "avg", "map"] = "token"
    """Features: the class token, the mean of the patches, or attention pooling of the patches."""
    class_token: bool = True
    """Have a class token."""
    num_registers: int = 0
    """Number of register tokens (Darcet et al. 2023, arXiv:2309.16588)."""
    embed_prefix: bool = True
    """Add position embeddings also to the class token and the registers."""
    pre_norm: bool = False
    """Normalise the embeddings, as CLIP; the patch embedding then has no bias."""
    qkv_bias: bool = True
    """Have a bias in the layers that compute query, key and value."""
    layer_scale: float | None = None
    """Initial value of the layer scale; None: no layer scale."""
    fc_norm: bool = False
    """Normalise after pooling instead of before it."""
    eps: float = 1e-6
    """Constant that layer normalisation adds to the variance."""

    def __post_init__(self) -> None:
        super().__post_init__()
        size, patch = self.image_size, self.patch_size
        if size < patch or size % patch:
            below = max(1, size // patch) * patch
            raise RecipeError(
                f"image_size is {size}, which is not a multiple of the patch size {patch}: use "
                f"{below} or {below + patch}"
            )

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens before the patches: the class token and the registers."""
        return self.class_token + self.num_registers

    @property
    def num_positions(self) -> int:
        """Number of position embeddings."""
        prefix = self.num_prefix_tokens if self.embed_prefix else 0
        return prefix + (self.image_size // self.patch_size) ** 2

    @property
    def hidden(self) -> int:
        """Number of hidden channels of an MLP."""
        return int(self.width * self.mlp_ratio)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Names of the blocks: `stem`, `blocks.0`, ..., `norm`, `head`."""
        return ("stem", *(f"blocks.{i}" for i in range(self.depth)), "norm", "head")

    @property
    def block_patterns(self) -> tuple[tuple[str, ...], ...]:
        """Patterns that select the parameters of each block, in the order of `blocks`."""
        options = {
            "cls_token": self.class_token,
            "reg_token": self.num_registers > 0,
            "norm_pre": self.pre_norm,
        }
        stem = ("pos_embed", "patch_embed", *(name for name, is_used in options.items() if is_used))
        norm = ("fc_norm" if self.fc_norm else "norm", *["attn_pool"] * (self.pool == "map"))
        return (stem, *((name,) for name in self.blocks[1:-2]), norm, (self.head,))


class PatchEmbed(nnx.Module):
    """Embedding of the patches."""

    def __init__(self, size: int, c: int, *, bias: bool, rngs: Rngs):
        self.proj = PatchConv(3, c, size, bias=bias, rngs=rngs)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps images `[b h w 3]` to patches `[b n c]`, row by row."""
        y = self.proj(x, context.child("proj"))
        return y.reshape(y.shape[0], -1, y.shape[-1])


class Block(nnx.Module):
    """Attention and MLP, each after a layer norm and around a shortcut."""

    def __init__(self, drop_path: float, config: ViTConfig, rngs: Rngs):
        c, value = config.width, config.layer_scale
        self.norm1 = LayerNorm(c, config.eps)
        self.attn = Attention(c, config.num_heads, qkv_bias=config.qkv_bias, rngs=rngs)
        self.ls1 = LayerScale(c, value) if value else Identity()
        self.norm2 = LayerNorm(c, config.eps)
        self.mlp = Mlp(c, config.hidden, config.activation, rngs=rngs)
        self.ls2 = LayerScale(c, value) if value else Identity()
        self.drop_path = Dropout(drop_path, rows=True)

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps tokens `[b n c]` to `[b n c]`."""
        child = context.child
        y = self.attn(self.norm1(x, child("norm1")), child("attn"))
        x = x + self.drop_path(self.ls1(y, child("ls1")), child("drop_path1"))
        y = self.mlp(self.norm2(x, child("norm2")), child("mlp"))
        return x + self.drop_path(self.ls2(y, child("ls2")), child("drop_path2"))


class ViT(nnx.Module):
    """Vision transformer whose blocks can be applied separately."""

    def __init__(self, config: ViTConfig, *, rngs: Rngs):
        c = config.width
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, c, bias=not config.pre_norm, rngs=rngs)

        def embeddings(count: int, std: float) -> nnx.Param[jax.Array]:
            return nnx.Param(std * jax.random.normal(rngs.params(), (1, count, c), jnp.float32))

        if config.class_token:
            self.cls_token = embeddings(1, 1e-6)
        if config.num_registers:
            self.reg_token = embeddings(config.num_registers, 1e-6)
        self.pos_embed = embeddings(config.num_positions, STD)
        if config.pre_norm:
            self.norm_pre = LayerNorm(c, config.eps)
        rates = drop_path_rates(config, config.depth)
        self.blocks = Sequential([Block(rate, config, rngs) for rate in rates])
        self.norm = Identity() if config.fc_norm else LayerNorm(c, config.eps)
        self.fc_norm = LayerNorm(c, config.eps) if config.fc_norm else Identity()
        if config.pool == "map":
            pool = c, config.num_heads, config.hidden, config.activation, config.eps
            self.attn_pool = AttentionPool(*pool, rngs=rngs)
        self.dropout = Dropout(config.dropout)
        self.head = build_head(c, config, rngs, std=STD)

    def __call__(self, x: jax.Array, context: Context, blocks: Sequence[str]) -> jax.Array:
        """Applies consecutive `blocks` of `ViTConfig.blocks`.

        Args:
          x: images `[b h w 3]`, or the output of the block before the first one.
          context: settings of the call.
          blocks: names of the blocks to apply.

        Returns:
          Tokens `[b n c]`, features `[b c]` after `norm`, or logits `[b k]` in the wider dtype of
          features and parameters.
        """
        apply = {"stem": self._stem, "norm": self._pool, "head": self._head}
        for name in blocks:
            if name in apply:
                x = apply[name](x, context)
            else:
                x = self.blocks[int(name.rpartition(".")[2])](x, context.child(name))
        return x

    def _stem(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps images `[b h w 3]` to tokens `[b n c]`: class token, registers and patches."""
        config = self.config
        x = self.patch_embed(x, context.child("patch_embed"))
        positions = self.pos_embed[...].astype(x.dtype)
        x = x if config.embed_prefix else x + positions
        for name in ("reg_token", "cls_token"):
            if hasattr(self, name):
                tokens = getattr(self, name)[...].astype(x.dtype)
                tokens = jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape[1:]))
                x = jnp.concatenate([tokens, x], 1)
        x = x + positions if config.embed_prefix else x
        return self.norm_pre(x, context.child("norm_pre")) if config.pre_norm else x

    def _pool(self, x: jax.Array, context: Context) -> jax.Array:
        """Maps tokens `[b n c]` to features `[b c]`."""
        config = self.config
        # Layer norm acts on each token separately, so only the tokens in use are normalised.
        x = x[:, 0] if config.pool == "token" else x[:, config.num_prefix_tokens :]
        x = self.norm(x, context.child("norm"))
        if config.pool == "map":
            x = self.attn_pool(x, context.child("attn_pool"))
        elif config.pool == "avg":
            x = x.mean(1)
        return self.fc_norm(x, context.child("fc_norm"))

    def _head(self, features: jax.Array, context: Context) -> jax.Array:
        dropped = self.dropout(features, context.child("dropout"))
        return self.head(dropped, context.child("head"))
