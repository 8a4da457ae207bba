"""Norm modes: the norm layers of a network, and which statistics each uses in a stage."""

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxft.errors import PatternError, RecipeError
from jaxft.labels import FROZEN, leaf_labels, match, paths
from jaxft.models.model import NormMode, Norms, Tree
from jaxft.stage_options import NormChoice

# Modes of frozen layers. Layers that train use mode `batch`, except with the choice `eval`.
_FROZEN_MODES: dict[NormChoice, NormMode] = {
    "batch": "batch",
    "frozen_eval": "running",
    "frozen_batch": "batch_fixed",
    "eval": "running",
}


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
    for mode in {*modes.values()}:
        check_mode(mode)
    return modes


def check_mode(mode: str) -> None:
    """Raises ValueError unless this is a norm mode."""
    if mode not in get_args(NormMode):
        raise ValueError(
            f"a norm's mode is {', '.join(map(repr, get_args(NormMode)))}, not {mode!r}"
        )


def norm_modes(
    params: Tree, stats: Tree, labels: Tree, choices: Mapping[str, NormChoice] | None = None
) -> Mapping[str, NormMode]:
    """Returns the mode of each norm layer, by path.

    Args:
      params, stats: parameters and statistics, or their shapes.
      labels: label tree of the stage.
      choices: choice by pattern; the first pattern that matches counts. The default is
        `frozen_eval`: frozen layers compute as when they were pretrained, and their running
        statistics stay bit-identical.

    Raises:
      PatternError: a pattern matches no norm layer, or is shadowed.
      RecipeError: a frozen layer has the choice `train_all`, where all norm layers train.
    """
    if not paths(stats):
        return {}
    chosen, complaints = match(stats, list(choices or {}))
    if complaints:
        raise PatternError(
            "\n".join(f"norms: among the norm layers, {complaint}" for complaint in complaints)
        )
    wanted = dict(zip(map(layer, paths(stats)), chosen, strict=True))
    trained = trained_layers(params, labels)
    modes: dict[str, NormMode] = {}
    for name in sorted(wanted):
        index = wanted[name]
        choice = "frozen_eval" if index is None else [*(choices or {}).values()][index]
        if name in trained:
            modes[name] = "running" if choice == "eval" else "batch"
        elif choice != "train_all":
            modes[name] = _FROZEN_MODES[choice]
    if frozen := sorted(wanted.keys() - modes.keys()):
        raise RecipeError(
            f"norms: with 'train_all' all norm layers train, and {len(frozen)} are frozen, such as "
            f"{frozen[0]}. Give them a learning rate in `train`, or choose 'batch', "
            "'frozen_eval' or 'frozen_batch'."
        )
    return modes


def trained_layers(params: Tree, labels: Tree) -> set[str]:
    """Returns the paths of the layers with a parameter that trains."""
    named = zip(paths(params), leaf_labels(params, labels), strict=True)
    return {layer(path) for path, label in named if label != FROZEN}


def layer(path: str) -> str:
    """Returns the path of the layer that has this parameter or statistic."""
    return path.rpartition(".")[0]


def dotted(path: Sequence[Any]) -> str:
    """Joins the keys of a path into a tree of dicts by dots, as in patterns."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator=".")


def statistics_mask(
    layer: str, x: jax.Array, mask: ArrayLike | None, layer_mask: jax.Array | None
) -> jax.Array | None:
    """Returns the mask of the values that contribute to a norm layer's batch statistics.

    Args:
      layer: path of the layer.
      x: its input `[b ...]`.
      mask: `[b]`, False for padding rows; None if there are none.
      layer_mask: the mask that the module passes to the layer, broadcastable to `x`.

    Returns:
      A mask broadcastable to `x`; None if all values contribute.

    Raises:
      ValueError: if the layer's input does not have the batch as its first axis.
    """
    if mask is None:
        return layer_mask
    rows = jnp.asarray(mask, bool)
    if x.shape[0] != len(rows):
        raise ValueError(
            f"the input of {layer} is {list(x.shape)} in a batch of {len(rows)}: its padding rows "
            "are unknown. Keep the batch as its first axis, or pass no mask."
        )
    rows = rows.reshape(-1, *(1 for _ in x.shape[1:]))
    return rows if layer_mask is None else rows & layer_mask


def check_batch_statistics(layer: str, x: jax.Array) -> None:
    """Raises ValueError if a norm layer's input has only one value per channel."""
    if x.size <= x.shape[-1]:
        raise ValueError(f"batch statistics of {layer} need more than one value per channel")
