"""Rematerialisation: for the backward pass a network's blocks are computed again."""

from functools import partial
from typing import Any

import jax

from jaxft.labels import Tree
from jaxft.models import Model


def block_by_block(
    model: Model, params: Tree, stats: Tree, x: jax.Array, *, first: str | None = None, **how: Any
) -> tuple[jax.Array, Tree]:
    """`model.apply` to the end, whose gradient remembers what comes into each block, and no more.

    Source: Chen et al. 2016 (arXiv:1604.06174).
    """
    for block in model.blocks[model.blocks.index(first) if first else 0 :]:
        one = partial(model.apply, first=block, last=block, **how)
        x, stats = jax.checkpoint(one)(params, stats, x)
    return x, stats
