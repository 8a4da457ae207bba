"""Parts that the optimizers share: hints for arguments of other libraries, and weight decay."""

from typing import Protocol

import jax
import jax.numpy as jnp

from jaxft.labels import Tree
from jaxft.tree_paths import Leaf, leaves_of

_LR = "learning rates belong to the stages, Stage(..., train={'fc': 1e-3})"
_DECAY = "it is called weight_decay"
HINTS = {
    "params": "stages select the parameters, Stage(..., train={'fc': 1e-3})",
    "lr": _LR,
    "learning_rate": _LR,
    "betas": "write b1=0.9, b2=0.999",
    "beta1": "it is called b1",
    "beta_1": "it is called b1",
    "beta2": "it is called b2",
    "beta_2": "it is called b2",
    "epsilon": "it is called eps",
    "decay": _DECAY,
    "wd": _DECAY,
    "l2": _DECAY,
    "weight_decay_rate": _DECAY,
    "rho": "RMSprop's average of squares is called alpha",
    "clipnorm": "it is a field of the stage, Stage(..., clip_norm=1.0)",
    "global_clipnorm": "it is a field of the stage, Stage(..., clip_norm=1.0)",
    "clipvalue": "it is a field of the stage, Stage(..., clip_value=0.5)",
    "use_ema": "it is a field of the stage, Stage(..., ema=0.999)",
    "mask": "decay_vectors=False spares biases and norms",
}
"""Argument names of torch, Keras and optax, each with its equivalent here."""


class HasDecay(Protocol):
    """An optimizer with weight decay."""

    @property
    def weight_decay(self) -> float:
        """Strength of the decay."""

    @property
    def decay_vectors(self) -> bool:
        """Whether the decay includes biases and norm layers, see `_is_vector`."""


def add_decay(rule: HasDecay, updates: Tree, params: Tree | None) -> Tree:
    """Adds weight_decay times the parameters to the updates."""
    if not rule.weight_decay:
        return updates
    leaves = [leaf for leaf in leaves_of(params) if leaf.value is not None]
    decayed = [
        u + rule.weight_decay * leaf.value if rule.decay_vectors or not _is_vector(leaf) else u
        for u, leaf in zip(jax.tree.leaves(updates), leaves, strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(updates), decayed)


def _is_vector(leaf: Leaf) -> bool:
    """Returns whether a parameter is a bias or belongs to a norm layer.

    Flax's names count too: stacked layers add an axis, and attention has biases `[heads size]`.
    """
    return jnp.ndim(leaf.value) <= 1 or leaf.path.rpartition(".")[2] in ("bias", "scale")


def zeros_like(params: Tree) -> Tree:
    """Returns zeros in the structure, shapes and dtypes of the parameters."""
    return jax.tree.map(jnp.zeros_like, params)
