"""Computes the features of a run's images, and keeps them and validation batches in a cache.

- A frozen prefix is the first blocks of the network, if a stage does not change them
  (`jaxft.train.frozen_prefix.FrozenPrefix`).
- A feature is the output of the stage's prefix for one image.
- An end is the last block of a prefix. One pass over the images computes the features at the end
  of this stage's prefix, and at the ends of later stages' shorter prefixes.
- A split is "train" or "val".
- A view is one random augmentation of each training image, numbered from 0 in its stage.

The cache finds features by a key of four parts:

- the split;
- stage and view, on which the random augmentation depends; None for images without augmentation,
  whose features serve all stages;
- the batch size, on which the last bits of the features depend;
- a hash of all weights and statistics up to the end, so that features of outdated weights are
  never found.

The cache ends with the process. A resumed run computes its features again, to the same last bit.
"""

import hashlib
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Hashable
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Source, Splits
from jaxft.data.batches import train_view_loader
from jaxft.distributed import Devices
from jaxft.errors import NonFiniteError, RecipeError
from jaxft.labels import Tree, paths
from jaxft.models.norm_modes import layer
from jaxft.train.compiled_stage import CompiledStage
from jaxft.train.frozen_prefix import block_labels
from jaxft.train.stage_program import StageProgram

Split = Literal["train", "val"]


class FeatureCache:
    """Trees of arrays by key, up to a number of bytes; drops the least recently used."""

    def __init__(self, max_bytes: int, *, on_disk: bool = False) -> None:
        """Creates an empty cache.

        Args:
          max_bytes: maximum size of all arrays together.
          on_disk: whether `allocate` creates files instead of memory.
        """
        self._max_bytes = self._free_bytes = max_bytes
        self._on_disk = on_disk
        self._trees: dict[Hashable, Any] = {}  # the least recently used first

    def get(self, key: Hashable) -> Any:
        """Returns the tree of a key; None if the cache does not hold it."""
        if key not in self._trees:
            return None
        self._trees[key] = self._trees.pop(key)  # moves it to the end of the dict
        return self._trees[key]

    def add(self, key: Hashable, tree: Any) -> None:
        """Adds a tree and drops others for it; does nothing if the tree alone is too large."""
        if _size(tree) > self._max_bytes:
            return
        if key in self._trees:
            self._free_bytes += _size(self._trees.pop(key))
        self._free_bytes -= _size(tree)
        self._trees[key] = tree
        while self._free_bytes < 0:
            oldest = next(iter(self._trees))
            self._free_bytes += _size(self._trees.pop(oldest))

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
        """Returns an uninitialised array, which is not part of the cache before `add`.

        Raises:
          RecipeError: the disk has no room for the array.
        """
        if not self._on_disk:
            return np.empty(shape, dtype)
        size = math.prod(shape) * dtype.itemsize
        # The file has no name: the disk frees it together with the array.
        with tempfile.TemporaryFile() as file:
            try:  # reserves the room, as a full disk would later end the process by SIGBUS
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise RecipeError(
                    f"the features of frozen layers need {size / 2**20:,.0f} MiB more in "
                    f"{tempfile.gettempdir()}: {error.strerror}. Set TMPDIR to a folder with more "
                    "room, or disk_cache_mib to the room that is left."
                ) from error
            return np.asarray(np.memmap(file, dtype, "r+", shape=shape))

    def replayed(
        self, key: Hashable, batches: Generator[Batch, None, None], count: int
    ) -> Generator[Batch, None, None]:
        """Yields validation batches, from the cache if an earlier call has stored all of them.

        Otherwise stores them in the room that is free; no features are dropped for them.

        Args:
          key: key of the batches.
          batches: yields the batches if the cache does not hold them.
          count: number of batches.
        """
        stored = self.get(key)
        if stored is not None:
            yield from stored
            return
        stored = []
        with closing(batches):
            for batch in batches:
                if count * _size(batch) <= self._free_bytes:
                    stored.append(batch)
                yield batch
        if len(stored) == count:  # otherwise they did not fit
            self.add(key, stored)


@jax.jit
def finite_rows(x: jax.Array) -> jax.Array:
    """Returns whether each row of `[b ...]` is finite, `[b]`."""
    return jnp.isfinite(x).reshape(len(x), -1).all(1)


def _size(tree: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(tree))


@dataclass(frozen=True)
class StageFeatures:
    """Features at the end of a stage's frozen prefix, each computed once and then cached.

    Attributes:
      program, compiled: the stage.
      snapshot: returns the stage's arrays at any step; those of the prefix never change.
      splits: the run's images.
      devices: where the prefix runs.
      cache: stores the features.
      each_batch: calls a function with each batch of a source, in the source's order; returns None
        if a signal came, otherwise the results. See `Trainer.of_each_batch` for its arguments.
    """

    program: StageProgram
    compiled: CompiledStage
    snapshot: Callable[[], Snapshot]
    splits: Splits
    devices: Devices
    cache: FeatureCache
    each_batch: Callable[..., list[Any] | None]

    def train(self, view: int = 0) -> np.ndarray | None:
        """Returns the features `[n ...]` of a view of the training images; None if a signal came.

        Raises:
          NonFiniteError: some are not finite, and the recipe does not skip such steps.
        """
        # All stages with `same_views` see the same images, so they share a key.
        stage_and_view = None if self.program.prefix.same_views else (self.program.index, view)
        features = self._features("train", stage_and_view)
        return None if features is None else features[:, 0]

    def val(self) -> np.ndarray | None:
        """Returns the features `[n f ...]` of the validation images; None if a signal came.

        `f` is 1, or with `tta="flip"` 2: each image, then its mirror image.

        Raises:
          NonFiniteError: some are not finite, and the recipe does not skip such epochs.
        """
        return self._features("val", None)

    def _features(self, split: Split, stage_and_view: tuple[int, int] | None) -> np.ndarray | None:
        """Returns features `[n f ...]` from the cache, or computes and caches them."""
        size, ends = self.program.settings.batch_size, self.program.prefix.ends
        keys = [(split, stage_and_view, size, self._digests[end]) for end in ends]
        cached: np.ndarray | None = self.cache.get(keys[-1])  # the last end is this stage's
        if cached is not None:
            return cached
        computed = self._compute(split, stage_and_view)
        if computed is None:
            return None
        for key, features in zip(keys, computed, strict=True):
            self.cache.add(key, features)
        return computed[-1]

    def _compute(
        self, split: Split, stage_and_view: tuple[int, int] | None
    ) -> list[np.ndarray] | None:
        """Computes the features at each of the prefix's ends in one pass over the images."""
        recipe, size = self.program.recipe, self.program.settings.batch_size
        source: Source = getattr(self.splits, split)
        flips = (1, -1) if split == "val" and recipe.tta == "flip" else (1,)
        params, stats, _ = self.snapshot()
        stops = recipe.on_nonfinite == "stop"
        error = partial(self._nonfinite_error, split, len(source)) if stops else None
        writer = _FeatureWriter(len(source), size, self.devices, self.cache.allocate, error)

        def enqueue(batch: Batch) -> None:
            views = (jnp.asarray(batch.image)[:, :, ::flip] for flip in flips)
            writer.enqueue([self._outputs(params, stats, x) for x in views])

        load_view = None  # without augmentation
        if stage_and_view:
            stage, view = stage_and_view
            load_view = partial(
                train_view_loader(
                    source,
                    recipe.preprocessing,
                    self.program.settings.augment,
                    seed=recipe.seed,
                    stage=stage,
                ),
                view=view,
            )
        if self.each_batch(source, enqueue, batch_size=size, load=load_view) is None:
            return None
        return writer.finish()

    def _outputs(
        self, params: Tree, stats: Tree, x: jax.Array
    ) -> tuple[list[jax.Array], jax.Array]:
        """Returns the features of images at each end, and whether those at the last are finite."""
        features = []
        for block, compute in self.compiled.prefix.items():
            x = compute(params, stats, x)
            if block in self.program.prefix.ends:
                features.append(x)
        return features, finite_rows(x)

    def _nonfinite_error(self, split: Split, num_images: int, image: int) -> NonFiniteError:
        """Returns the error of an image, counted from 0, whose features are not finite."""
        kind, effect = {
            "train": ("training", "and skips the steps that use this image."),
            "val": ("validation", "and never takes an epoch without a finite loss as the best."),
        }[split]
        stage, blocks = self.program.plan.stage, self.program.prefix.blocks
        where = f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"
        way_out = f" With --on-nonfinite skip the same command resumes {effect}"
        return NonFiniteError(
            f"stage {stage.name!r}: the features of {kind} image {image} (counted from 0, of "
            f"{num_images} images) are not finite after the frozen {where}. Look at this image, at "
            "the weights (large ones overflow) and at the running statistics."
            + ("" if stage.linear_probe else way_out)
        )

    @cached_property
    def _digests(self) -> dict[str, str]:
        """Hash of all weights and statistics from the input up to each block of the prefix."""
        params, stats, _ = self.devices.host(self.snapshot()._replace(opt_state=None))
        param_blocks = jax.tree.leaves(block_labels(self.program.model, params))
        block_of_layer = dict(zip(map(layer, paths(params)), param_blocks, strict=True))
        stats_blocks = [block_of_layer[layer(path)] for path in paths(stats)]
        leaves = [*jax.tree.leaves(params), *jax.tree.leaves(stats)]
        hash_so_far, digests = hashlib.sha256(), {}
        for block in self.program.prefix.blocks:
            for leaf_block, leaf in zip((*param_blocks, *stats_blocks), leaves, strict=True):
                if leaf_block == block:
                    hash_so_far.update(np.asarray(leaf).tobytes())
            digests[block] = hash_so_far.hexdigest()
        return digests


@dataclass
class _FeatureWriter:
    """Copies features from the devices, batch by batch, into arrays of all images of a split.

    A batch stays pending until the next batch is enqueued, so that the devices compute the next
    batch during the copy.

    Attributes:
      num_images: number of images of the split.
      batch_size: images per batch; further rows of a batch only fill the devices.
      devices: copies arrays to the host.
      allocate: returns an uninitialised array.
      error: returns the error of an image whose features are not finite; None: they are stored.
      arrays: features `[n f ...]` at each end.
    """

    num_images: int
    batch_size: int
    devices: Devices
    allocate: Callable[[tuple[int, ...], np.dtype[Any]], np.ndarray]
    error: Callable[[int], NonFiniteError] | None
    arrays: list[np.ndarray] = field(default_factory=list)
    _pending: deque[list[tuple[list[jax.Array], jax.Array]]] = field(default_factory=deque)
    _num_written: int = 0

    def enqueue(self, outputs: list[tuple[list[jax.Array], jax.Array]]) -> None:
        """Takes the features of a batch at each end and their finite rows, for each flip."""
        self._pending.append(outputs)
        if len(self._pending) > 1:
            self._write()

    def finish(self) -> list[np.ndarray]:
        """Writes the last batch and returns the features at each end."""
        self._write()
        return self.arrays

    def _write(self) -> None:
        by_flip, finite = zip(*self.devices.host(self._pending.popleft()), strict=True)
        by_end = [np.stack(flips, 1) for flips in zip(*by_flip, strict=True)]
        if not self.arrays:  # the first batch has the shapes
            for x in by_end:
                self.arrays.append(self.allocate((self.num_images, *x.shape[1:]), x.dtype))
        first = self._num_written
        count = min(self.batch_size, self.num_images - first)
        wrong = np.flatnonzero(~np.all(finite, 0)[:count])
        if len(wrong) and self.error:
            raise self.error(first + int(wrong[0]))
        for array, x in zip(self.arrays, by_end, strict=True):
            array[first : first + count] = x[:count]
        self._num_written += count
