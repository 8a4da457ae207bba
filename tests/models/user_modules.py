"""Flax modules in the styles that users write."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx


class Block(nn.Module):
    """Uses `setup` and takes no flag; its norm layer always asks for batch statistics."""

    def setup(self):
        self.conv = nn.Conv(4, (3, 3), use_bias=False)
        self.bn = nn.BatchNorm(use_running_average=False, use_scale=False, use_bias=False)

    def __call__(self, x):
        return nn.relu(self.bn(self.conv(x)))


class Compact(nn.Module):
    """Style of Flax's examples, with the flag `train`."""

    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(3, (3, 3), strides=2)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean((1, 2)))
        x = nn.relu(nn.BatchNorm(momentum=0.5)(nn.Dense(4)(x), use_running_average=not train))
        return nn.Dense(5, name="head")(x)


class Nested(nn.Module):
    """Norm without parameters, dropout that is always on, a module as a field."""

    out: nn.Module = nn.Dense(5)
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x):
        x = Block(name="block")(x).mean((1, 2))
        return self.out(nn.Dropout(self.dropout, deterministic=False)(x))


class RunningBatchNorm(nn.BatchNorm):
    """A subclass that overrides the call."""

    @nn.compact
    def __call__(self, x):
        return super().__call__(x, use_running_average=True)


class BFloat16(nn.Module):
    """Half precision, a subclassed norm, and stochastic depth with a separate random stream."""

    @nn.compact
    def __call__(self, x, deterministic=True):
        x = nn.Conv(3, (2, 2), dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)(x)
        x = RunningBatchNorm(dtype=jnp.bfloat16)(x)
        if not deterministic:
            x = x * jax.random.uniform(self.make_rng("drop_path"), (), x.dtype)
        return nn.Dense(5, dtype=jnp.bfloat16, name="head")(x.mean((1, 2)))


class Attention(nn.Module):
    """Norms without statistics, and kernels of every rank."""

    @nn.compact
    def __call__(self, x):
        x = nn.ConvTranspose(4, (2, 2))(x)
        x = nn.GroupNorm(2)(x)
        x = x.reshape(len(x), -1, 4) + nn.Embed(64, 4)(jnp.arange(x.shape[1] * x.shape[2]))
        x = nn.LayerNorm()(nn.MultiHeadDotProductAttention(2)(nn.Dense(4, name="linear")(x)))
        return nn.Dense(5, name="head")(x.mean(1))


class TrainingArgument(nnx.Module):
    """Passes the argument `training` to its norm and dropout."""

    def __init__(self, width=4, dropout=0.0, *, rngs):
        self.conv = nnx.Conv(3, width, (3, 3), strides=2, rngs=rngs)
        self.layers = nnx.List([nnx.BatchNorm(width, momentum=0.9, rngs=rngs)])
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.fc = nnx.Linear(width, 5, rngs=rngs)

    def __call__(self, x, *, training: bool):
        x = self.layers[0](self.conv(x), use_running_average=not training)
        return self.fc(self.drop(nnx.relu(x).mean((1, 2)), deterministic=not training))


class PlainCallBatchNorm(nnx.BatchNorm):
    """A subclass that overrides the call."""

    def __call__(self, x, **_):
        return super().__call__(x)


class ModeFlag(nnx.Module):
    """Depends on `train()` and `eval()` alone; one norm has no parameters, one is a subclass."""

    def __init__(self, dropout=0.0, *, rngs):
        self.norm = nnx.BatchNorm(3, use_scale=False, use_bias=False, rngs=rngs)
        self.body = nnx.Sequential(
            nnx.Linear(3, 4, rngs=rngs), PlainCallBatchNorm(4, rngs=rngs), nnx.relu
        )
        self.drop = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Dict(out=nnx.Linear(4, 5, rngs=rngs))

    def __call__(self, x):
        return self.head.out(self.drop(self.body(self.norm(x.mean((1, 2))))))
