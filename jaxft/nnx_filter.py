"""The variables that train, as a filter of Flax NNX; imports no Flax."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxft.labels import FROZEN, Tree
from jaxft.tree_paths import dotted, leaves_of


@dataclass(frozen=True)
class _TrainableFilter:
    """An NNX filter: a predicate `(path, variable) -> bool` for variables that train."""

    paths: frozenset[str]

    def __call__(self, path: tuple[Any, ...], variable: Any) -> bool:
        """Returns True if the variable at this path trains."""
        return dotted(path) in self.paths


def trainable_filter(labels: Tree) -> Callable[[tuple[Any, ...], Any], bool]:
    """Returns the NNX filter of the variables that train.

    Pass it as `wrt` of `nnx.Optimizer` and to `nnx.DiffState`. Then gradients and optimizer state
    exist only for the variables that train. Equal labels give equal filters.

    Args:
      labels: label tree of an NNX module, its state, or its pure state.

    Example:
      >>> trains = trainable_filter({"body": {"kernel": "frozen"}, "head": {"kernel": "head"}})
      >>> trains(("body", "kernel"), None), trains(("head", "kernel"), None)
      (False, True)
    """
    segments = [
        leaf.path.split(".") for leaf in leaves_of(labels) if leaf.value not in (None, FROZEN)
    ]
    # A variable may hold a tree, so every start of a path counts.
    starts = (".".join(path[:i]) for path in segments for i in range(1, len(path) + 1))
    return _TrainableFilter(frozenset(starts))
