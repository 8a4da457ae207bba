"""Flax modules that can be cut into blocks, and stacked layers."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx

from jaxft.models import NNX, Linen


class ResBlock(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x, train: bool):
        y = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        y = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(y))
        return nn.Conv(self.width, (1, 1), use_bias=False)(x) + y


class ResCNN(nn.Module):
    """Compact style, with norm layers and a dropout before the head."""

    width: int = 4
    dropout: float = 0.25
    num_classes: int = 5

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, use_scale=False, use_bias=False)(x)
        for factor in (1, 2, 2):
            x = ResBlock(factor * self.width)(x, train)
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        return nn.Dense(self.num_classes, name="head")(x)


class PreNorm(nnx.Module):
    """A layer of a transformer."""

    def __init__(self, width=8, dropout=0.0, *, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attn = nnx.MultiHeadAttention(2, width, decode=False, rngs=rngs)
        self.norm2 = nnx.RMSNorm(width, rngs=rngs)
        wide = 2 * width
        self.mlp = nnx.Sequential(
            nnx.Linear(width, wide, rngs=rngs), nnx.gelu, nnx.Linear(wide, width, rngs=rngs)
        )
        self.drop = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.drop(self.mlp(self.norm2(x)))


class Patches(nnx.Module):
    """Embeds patches of an image."""

    def __init__(self, width, *, rngs):
        self.embed = nnx.Conv(3, width, (2, 2), strides=2, rngs=rngs)
        self.position = nnx.Param(0.1 * jax.random.normal(rngs.params(), (16, width)))

    def __call__(self, x):
        x = self.embed(x)
        return x.reshape(len(x), -1, x.shape[-1]) + self.position[...]


class ViT(nnx.Module):
    """A pre-norm transformer for images of 8 pixels."""

    def __init__(self, width=8, dropout=0.0, depth=3, num_classes=5, *, rngs):
        self.patches = Patches(width, rngs=rngs)
        self.layers = nnx.List([PreNorm(width, dropout, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.25, rngs=rngs)
        self.head = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.drop(self.norm(x).mean(1)))


class LinenLayer(nn.Module):
    """A layer of a transformer, for nn.scan."""

    @nn.compact
    def __call__(self, x, _):
        y = nn.MultiHeadDotProductAttention(2, name="attn")(nn.LayerNorm()(x))
        return x + nn.Dense(8, name="mlp")(nn.GroupNorm(2)(x + y)), None


class LinenScanned(nn.Module):
    depth: int = 4

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (2, 2), strides=2, name="embed")(x).reshape(len(x), -1, 8)
        layers = nn.scan(
            LinenLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.depth,
        )
        x, _ = layers(name="layers")(x, None)
        return nn.Dense(5, name="head")(nn.RMSNorm(name="norm")(x).mean(1))


class NNXScanned(nnx.Module):
    def __init__(self, depth=4, *, rngs):
        @nnx.split_rngs(splits=depth)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return PreNorm(rngs=rngs)

        self.patches = Patches(8, rngs=rngs)
        self.layers = layers(rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def through(x, layer):
            return layer(x)

        return self.head(through(self.patches(x), self.layers).mean(1))


SHAPE = (8, 8, 3)
CNN = Linen(ResCNN(), shape=SHAPE, head="head", blocks=("ResBlock_0", "ResBlock_2"))
VIT = NNX(ViT, shape=SHAPE, head="head", blocks=("patches", "layers.1", "layers.2", "norm"))
SCANNED = {
    "linen": Linen(LinenScanned(), shape=SHAPE, head="head", stacked=("layers",)),
    "nnx": NNX(NNXScanned, shape=SHAPE, head="head", stacked=("layers",)),
}


def images(count=4, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(1), (count, *SHAPE), dtype)
