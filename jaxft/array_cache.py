"""A cache of trees of arrays that is limited in bytes."""

from collections.abc import Generator, Hashable
from contextlib import closing
from typing import Any, TypeVar

import jax

T = TypeVar("T")


class ArrayCache:
    """Trees of arrays by key, up to a number of bytes; evicts the least recently used.

    Counts the bytes of all arrays alike, whether they are in memory or in mapped files. Use one
    cache for each.
    """

    def __init__(self, max_bytes: int) -> None:
        """Creates an empty cache.

        Args:
          max_bytes: maximum size of all arrays together.
        """
        self._max_bytes = self._free_bytes = max_bytes
        self._trees: dict[Hashable, Any] = {}  # the least recently used first

    def get(self, key: Hashable) -> Any:
        """Returns the tree of a key; None if the cache does not hold it."""
        if key not in self._trees:
            return None
        self._trees[key] = self._trees.pop(key)  # moves it to the end of the dict
        return self._trees[key]

    def add(self, key: Hashable, tree: Any) -> None:
        """Adds a tree and evicts others for it; does nothing if the tree alone is too large."""
        if _num_bytes(tree) > self._max_bytes:
            return
        if key in self._trees:
            self._free_bytes += _num_bytes(self._trees.pop(key))
        self._free_bytes -= _num_bytes(tree)
        self._trees[key] = tree
        while self._free_bytes < 0:
            oldest = next(iter(self._trees))
            self._free_bytes += _num_bytes(self._trees.pop(oldest))

    def clear(self) -> None:
        """Evicts all trees."""
        self._trees.clear()
        self._free_bytes = self._max_bytes

    def replayed(
        self, key: Hashable, trees: Generator[T, None, None], count: int
    ) -> Generator[T, None, None]:
        """Yields trees, such as batches, from the cache if an earlier call has stored all of them.

        Otherwise stores them if all fit in the room that is free. Never evicts to make room.

        Args:
          key: key of all trees together.
          trees: yields the trees if the cache does not hold them.
          count: number of trees.
        """
        stored = self.get(key)
        if stored is not None:
            yield from stored
            return
        stored = []
        with closing(trees):
            for tree in trees:
                if count * _num_bytes(tree) <= self._free_bytes:
                    stored.append(tree)
                yield tree
        if len(stored) == count:  # otherwise they did not fit
            self.add(key, stored)


def _num_bytes(tree: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))
