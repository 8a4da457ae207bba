"""Which statistics each norm layer of a network is told to use."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax

from jaxft.models.model import NormMode, Norms, Tree


def norm_layers(stats: Tree) -> frozenset[str]:
    """The path of each layer that has running statistics: `layer4.0.bn1`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(stats)
    return frozenset(dotted(path[:-1]) for path, _ in flat)


def layer_modes(name: str, layers: frozenset[str], norms: Norms) -> Mapping[str, NormMode]:
    """The mode of each of the norm layers of the network called `name`.

    Raises ValueError for an unknown mode, and for `norms` that leave out a layer or name one that
    does not exist.
    """
    modes = dict.fromkeys(layers, norms) if isinstance(norms, str) else norms
    if wrong := sorted(layers ^ modes.keys()):
        raise ValueError(
            f"norms must name each norm layer of {name} once; "
            f"missing or unknown: {', '.join(wrong)}"
        )
    if unknown := {*modes.values()} - {*get_args(NormMode)}:
        raise ValueError(
            f"a norm's mode is 'running', 'batch' or 'batch_fixed', not {unknown.pop()!r}"
        )
    return modes


def dotted(path: Sequence[Any]) -> str:
    """The keys that lead into a tree of dicts, as patterns spell them."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")
