"""Features of a run's images, and validation batches, kept while the process lives.

Features are keyed by the images, their views, and a hash of all weights and statistics that
computed them, so that outdated ones are never found. They are not saved: a resumed run computes
them again, to the same last bit.
"""

import hashlib
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Hashable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Source, Splits
from jaxft.data.batches import train_view_loader
from jaxft.distributed import Devices
from jaxft.errors import InterruptedRunError, NonFiniteError, RecipeError
from jaxft.labels import paths
from jaxft.models.norm_modes import layer
from jaxft.train.compiled_stage import CompiledStage
from jaxft.train.frozen_prefix import block_labels
from jaxft.train.stage_program import StageProgram

Half = Literal["train", "val"]


class FeatureCache:
    """Trees of arrays by key, up to a number of bytes; drops the least recently used."""

    def __init__(self, max_bytes: int, *, on_disk: bool = False) -> None:
        """Creates an empty cache.

        Args:
          max_bytes: size of all arrays.
          on_disk: whether `empty` allocates files.
        """
        self._max = self._free = max_bytes
        self._on_disk = on_disk
        self._trees: dict[Hashable, Any] = {}

    def get(self, key: Hashable) -> Any:
        """Returns the tree of a key; None without one."""
        if key not in self._trees:
            return None
        self._trees[key] = self._trees.pop(key)  # now the last of them
        return self._trees[key]

    def add(self, key: Hashable, tree: Any) -> None:
        """Adds a tree, unless it alone is too large."""
        if _size(tree) > self._max:
            return
        if key in self._trees:
            self._free += _size(self._trees.pop(key))
        self._free -= _size(tree)
        self._trees[key] = tree
        while self._free < 0:
            oldest = next(iter(self._trees))
            self._free += _size(self._trees.pop(oldest))

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Returns an array to fill; on disk it is a file without a name, which goes with it.

        Raises:
          RecipeError: the disk has no room for it.
        """
        if not self._on_disk:
            return np.empty(shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        with tempfile.TemporaryFile() as file:
            try:  # now, or a full disk would be a SIGBUS later
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise RecipeError(
                    f"what frozen layers make takes {size / 2**20:,.0f} MiB more in "
                    f"{tempfile.gettempdir()}: {error.strerror}. Set TMPDIR to a folder with more "
                    "room, or disk_cache_mib to what there is."
                ) from error
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))

    def replayed(
        self, key: Hashable, batches: Generator[Batch, None, None], count: int
    ) -> Generator[Batch, None, None]:
        """Yields `count` batches, from memory if all were seen before and there was room."""
        seen = self.get(key)
        if seen is not None:
            yield from seen
            return
        seen = []
        with closing(batches):
            for batch in batches:
                if count * _size(batch) <= self._free:
                    seen.append(batch)
                yield batch
        if len(seen) == count:
            self.add(key, seen)


@jax.jit
def finite_rows(x: jax.Array) -> jax.Array:
    """Returns whether each row of `[b ...]` is finite, `[b]`."""
    return jnp.isfinite(x).reshape(len(x), -1).all(1)


def _size(tree: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


@dataclass(frozen=True)
class StageFeatures:
    """Features of the frozen prefix of a stage, computed once and cached.

    Attributes:
      program, compiled: the stage.
      snapshot: returns arrays with the stage's prefix, which no step changes.
      splits: the run's images.
      devices: where the prefix runs.
      cache: where the features are kept.
      each_batch: `Trainer.of_each_batch`.
      stopped: returns the error of a run that a signal has stopped.
    """

    program: StageProgram
    compiled: CompiledStage
    snapshot: Callable[[], Snapshot]
    splits: Splits
    devices: Devices
    cache: FeatureCache
    each_batch: Callable[..., list[Any] | None]
    stopped: Callable[[], InterruptedRunError]

    def train(self, view: int = 0) -> np.ndarray:
        """Returns the features of a view of the training images, `[n ...]`.

        Raises:
          InterruptedRunError: a signal came meanwhile.
        """
        stage_view = None if self.program.prefix.same_views else (self.program.index, view)
        rows = self._rows("train", stage_view)
        if rows is None:
            raise self.stopped()
        return rows[:, 0]

    def val(self) -> np.ndarray | None:
        """Returns the features of the validation images, `[n v ...]`; v is 2 with their mirrors.

        Returns None if a signal came meanwhile.
        """
        return self._rows("val", None)

    def _rows(self, half: Half, view: tuple[int, int] | None) -> np.ndarray | None:
        size = self.program.settings.batch_size  # the last bits of an output depend on it
        keys = [(half, view, size, self._digests[end]) for end in self.program.prefix.ends]
        cached: np.ndarray | None = self.cache.get(keys[-1])
        if cached is not None:
            return cached
        computed = self._compute(half, view)
        if computed is None:
            return None
        for key, rows in zip(keys, computed, strict=True):
            self.cache.add(key, rows)
        return computed[-1]

    def _compute(self, half: Half, view: tuple[int, int] | None) -> list[np.ndarray] | None:
        """Computes the features at each of the prefix's ends in one pass over the images.

        Returns None if a signal came. Raises NonFiniteError for features that are not finite,
        unless the recipe skips them.
        """
        recipe, size = self.program.recipe, self.program.settings.batch_size
        source: Source = getattr(self.splits, half)
        sides = (1, -1) if half == "val" and recipe.tta == "flip" else (1,)
        params, stats, _ = self.snapshot()
        arrays: list[np.ndarray] = []
        waiting: deque[list[tuple[list[jax.Array], jax.Array]]] = deque()
        done = 0

        def outputs(x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
            features = []
            for block, compute in self.compiled.prefix.items():
                x = compute(params, stats, x)
                if block in self.program.prefix.ends:
                    features.append(x)
            return features, finite_rows(x)

        def store() -> None:
            nonlocal done
            by_side, finite = zip(*self.devices.host(waiting.popleft()), strict=True)
            by_end = [np.stack(sides, 1) for sides in zip(*by_side, strict=True)]
            if not arrays:
                shapes = ((len(source), *x.shape[1:]) for x in by_end)
                arrays.extend(map(self.cache.empty, shapes, (x.dtype for x in by_end)))
            count = min(size, len(source) - done)
            wrong = np.flatnonzero(~np.all(finite, 0)[:count])
            if len(wrong) and recipe.on_nonfinite == "stop":
                raise self._not_finite(half, done + int(wrong[0]), len(source))
            for array, rows in zip(arrays, by_end, strict=True):
                array[done : done + count] = rows[:count]
            done += count

        def through(batch: Batch) -> None:
            images = (jnp.asarray(batch.image)[:, :, ::side] for side in sides)
            waiting.append([outputs(x) for x in images])
            if len(waiting) > 1:  # the device is at work on the next batch meanwhile
                store()

        drawn = None
        if view:
            stage, number = view
            of_stage = train_view_loader(
                source,
                recipe.preprocessing,
                self.program.settings.augment,
                seed=recipe.seed,
                stage=stage,
            )
            drawn = partial(of_stage, view=number)
        if self.each_batch(source, through, batch_size=size, load=drawn) is None:
            return None
        store()
        return arrays

    def _not_finite(self, half: Half, image: int, images: int) -> NonFiniteError:
        use, skipping = {
            "train": ("train on", "leaves steps with it out"),
            "val": ("validate", "has no epoch as the best whose validation is not finite"),
        }[half]
        stage, blocks = self.program.plan.stage, self.program.prefix.blocks
        where = f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"
        way_out = f" With --on-nonfinite skip the same command resumes and {skipping}."
        return NonFiniteError(
            f"stage {stage.name!r}: the features of image {image} (of {images} to {use}, counted "
            f"from 0), as its frozen {where} compute them, are not finite. Look at that image, at "
            "the weights (large ones overflow) and at the running statistics."
            + ("" if stage.linear_probe else way_out)
        )

    @cached_property
    def _digests(self) -> dict[str, str]:
        """Hash of all arrays up to each block of the prefix, by block."""
        params, stats, _ = self.devices.host(self.snapshot()._replace(opt_state=None))
        of_params = jax.tree.leaves(block_labels(self.program.model, params))
        of_layer = dict(zip(map(layer, paths(params)), of_params, strict=True))
        of_stats = [of_layer[layer(path)] for path in paths(stats)]
        leaves = [*jax.tree.leaves(params), *jax.tree.leaves(stats)]
        sofar, digests = hashlib.sha256(), {}
        for block in self.program.prefix.blocks:
            for leaf_block, leaf in zip((*of_params, *of_stats), leaves, strict=True):
                if leaf_block == block:
                    sofar.update(np.asarray(leaf).tobytes())
            digests[block] = sofar.hexdigest()
        return digests
