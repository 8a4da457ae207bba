"""Finds a network's norm layers and checks the mode of each."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax

from jaxft.models.model import NormMode, Norms, Tree


def norm_layers(stats: Tree) -> frozenset[str]:
    """Returns the path of each layer that has running statistics, such as `layer4.0.bn1`."""
    flat, _ = jax.tree_util.tree_flatten_with_path(stats)
    return frozenset(dotted(path[:-1]) for path, _ in flat)


def layer_modes(name: str, layers: frozenset[str], norms: Norms) -> Mapping[str, NormMode]:
    """Returns the mode of each norm layer.

    Args:
      name: name of the network, for error messages.
      layers: paths of its norm layers.
      norms: one mode for all layers, or a mode per layer.

    Raises:
      ValueError: if a mode is unknown, a layer has no mode, or a mode belongs to no layer.
    """
    modes = dict.fromkeys(layers, norms) if isinstance(norms, str) else norms
    if mismatched := sorted(layers ^ modes.keys()):
        raise ValueError(
            f"norms must name each norm layer of {name} once; "
            f"missing or unknown: {', '.join(mismatched)}"
        )
    if unknown := {*modes.values()} - {*get_args(NormMode)}:
        raise ValueError(
            f"a norm's mode is 'running', 'batch' or 'batch_fixed', not {unknown.pop()!r}"
        )
    return modes


def dotted(path: Sequence[Any]) -> str:
    """Joins the keys of a path into a tree of dicts by dots, as in patterns."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")
