"""Computes the features of a run's images, each once, and keeps them in a cache.

- A frozen prefix is the leading blocks of the network that a stage leaves unchanged
  (`jaxft.train.frozen_prefix.FrozenPrefix`).
- A feature is the output of the stage's prefix for one image.
- An end is the last block of a prefix. One pass over the images computes the features at the end
  of this stage's prefix, and at the ends of later stages' shorter prefixes.
- A split is "train" or "val".
- A view is one random augmentation of each training image, numbered from 0 in its stage.

The cache finds features by a key of four parts:

- the split;
- stage and view, on which the random augmentation depends; None for images without augmentation,
  whose features serve all stages. A pass over augmented images has no end but this stage's, since
  no other stage sees these images;
- the batch size, on which the last bits of the features depend;
- a hash of all weights and statistics up to the end, so that features of outdated weights are
  never found.

The cache ends with the process. A resumed run computes its features again, to the same last bit.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.array_cache import ArrayCache
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Source, Splits
from jaxft.data.batches import train_view_loader
from jaxft.data.source import Target
from jaxft.devices import Devices
from jaxft.errors import NonFiniteError
from jaxft.labels import Tree, paths
from jaxft.models.norm_modes import layer
from jaxft.train.compiled_stage import CompiledStage
from jaxft.train.feature_check import check_features
from jaxft.train.feature_storage import Features, Storage
from jaxft.train.frozen_prefix import layer_blocks
from jaxft.train.stage_program import StageProgram

Split = Literal["train", "val"]


@jax.jit
def finite_rows(x: jax.Array) -> jax.Array:
    """Returns whether each row of `[b ...]` is finite, `[b]`."""
    return jnp.isfinite(x).reshape(len(x), -1).all(1)


class EachBatch(Protocol):
    """Calls `step` with each batch of a source, in the source's order.

    Returns the results, or None if a signal came. `Trainer.of_each_batch` is one.
    """

    def __call__(  # noqa: D102
        self,
        source: Source,
        step: Callable[[Batch], None],
        *,
        batch_size: int,
        load: Callable[[int], tuple[np.ndarray, Target]] | None,
        title: str,
    ) -> list[None] | None: ...


@dataclass(frozen=True)
class StageFeatures:
    """Features at the end of a stage's frozen prefix, each computed once and then cached.

    Attributes:
      program, compiled: the stage.
      snapshot: returns the stage's current arrays; the prefix's are the same at every step.
      splits: the run's images.
      devices: where the prefix runs.
      cache: stores the features.
      each_batch: calls a function with each batch of a source.
    """

    program: StageProgram
    compiled: CompiledStage
    snapshot: Callable[[], Snapshot]
    splits: Splits
    devices: Devices
    cache: ArrayCache
    each_batch: EachBatch

    def train(self, view: int = 0) -> Features | None:
        """Returns the features `[n 1 ...]` of a view of the training images.

        Returns None if a signal came. See `DeviceStorage` for the shape in device memory.

        Raises:
          NonFiniteError: some are not finite, and the recipe does not skip such steps.
          RecipeError: the disk has no room for them.
        """
        stage_and_view = None if self.program.prefix.unaugmented else (self.program.index, view)
        return self._features("train", stage_and_view)

    def val(self) -> Features | None:
        """Returns the features `[n f ...]` of the validation images; None if a signal came.

        `f` is 1, or with `tta="flip"` 2: each image, then its mirror image. See `DeviceStorage` for
        the shape in device memory.

        Raises:
          NonFiniteError: some are not finite, and the recipe does not skip such epochs.
          RecipeError: the disk has no room for them.
        """
        return self._features("val", None)

    def _features(self, split: Split, stage_and_view: tuple[int, int] | None) -> Features | None:
        """Returns features from the cache, or computes and caches them."""
        size, ends = self.program.settings.batch_size, self.program.prefix.ends
        keys = [(split, stage_and_view, size, self._digests[end]) for end in ends]
        cached: Features | None = self.cache.get(keys[-1])  # the last end is this stage's
        if cached is not None:
            return cached
        computed = self._compute(split, stage_and_view)
        if computed is None:
            return None
        for key, features in zip(keys, computed, strict=True):
            if features is not None:
                self.cache.add(key, features)
        return computed[-1]

    def _compute(
        self, split: Split, stage_and_view: tuple[int, int] | None
    ) -> list[Features | None] | None:
        """Computes the features at each of the prefix's ends in one pass over the images.

        Returns None if a signal came; see `_FeatureWriter.finish` for ends without features.
        """
        recipe, size = self.program.recipe, self.program.settings.batch_size
        source: Source = getattr(self.splits, split)
        flips = (1, -1) if split == "val" and recipe.tta == "flip" else (1,)
        params, stats, _ = self.snapshot()
        stops = recipe.on_nonfinite == "stop"
        storage = self.program.prefix.storage(self.devices, recipe)
        error = partial(self._nonfinite_error, split, len(source)) if stops else None
        writer = _FeatureWriter(len(source), size, self.devices, storage, error)
        unchecked = not stage_and_view or stage_and_view[1] == 0  # once for all views

        def enqueue(batch: Batch) -> None:
            nonlocal unchecked
            flipped = [jnp.asarray(batch.image)[:, :, ::flip] for flip in flips]
            features = [self._features_at_ends(params, stats, x) for x in flipped]
            if unchecked:
                check_features(self.program, params, stats, flipped[0], features[0][-1])
            unchecked = False
            writer.enqueue(features)

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
        title = f"Features of {split} images"
        how: dict[str, Any] = {"batch_size": size, "padded": True, "load": load_view}
        if self.each_batch(source, enqueue, title=title, **how) is None:
            return None
        return writer.finish()

    def _features_at_ends(self, params: Tree, stats: Tree, x: jax.Array) -> list[jax.Array]:
        """Returns the features `[b ...]` of images `[b h w c]` at each end."""
        features = []
        for block, compute in self.compiled.prefix.items():
            x = compute(params, stats, x)
            if block in self.program.prefix.ends:
                features.append(x)
        return features

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
        params, stats, _ = self.snapshot()
        block_of_layer = layer_blocks(self.program.model, params, stats)
        arrays: dict[str, list[Any]] = {block: [] for block in self.program.prefix.blocks}
        for tree in (params, stats):
            for path, array in zip(paths(tree), jax.tree.leaves(tree), strict=True):
                if (block := block_of_layer[layer(path)]) in arrays:
                    arrays[block].append(array)
        arrays = self.devices.host(arrays)
        hash_so_far, digests = hashlib.sha256(), {}
        for block in self.program.prefix.blocks:
            for array in arrays[block]:
                hash_so_far.update(np.asarray(array).tobytes())
            digests[block] = hash_so_far.hexdigest()
        return digests


@dataclass
class _FeatureWriter:
    """Stores features batch by batch in arrays of all images of a split.

    A batch stays pending until the next batch is enqueued, so that the devices compute the next
    batch during a copy to the host.

    Attributes:
      num_images: number of images of the split.
      batch_size: images per batch; further rows are padding, so that the batch divides over the
        devices.
      devices: copies arrays to the host.
      storage: where the features are stored.
      error: returns the error of an image whose features are not finite; None: they are stored.
      arrays: features at each end, `[n f ...]` with `f` flips or as in `DeviceStorage`.
    """

    num_images: int
    batch_size: int
    devices: Devices
    storage: Storage
    error: Callable[[int], NonFiniteError] | None
    arrays: list[Any] = field(default_factory=list)
    _pending: list[tuple[jax.Array, jax.Array]] | None = None
    _num_written: int = 0

    def enqueue(self, features: list[list[jax.Array]]) -> None:
        """Takes the features `[b ...]` of the next batch, by flip and end."""
        previous = self._pending
        stacked = [jnp.stack(flips, 1) for flips in zip(*features, strict=True)]
        self._pending = [(x, finite_rows(x)) for x in stacked]
        if previous is not None:
            self._write(previous)

    def finish(self) -> list[Features | None]:
        """Writes the last batch and returns the features at each end.

        Returns None for an end of a later stage whose features are not finite: that stage raises
        the error when it computes them itself.
        """
        assert self._pending is not None  # a split has images
        self._write(self._pending)
        return self.arrays

    def _write(self, batch: list[tuple[jax.Array, jax.Array]]) -> None:
        """Writes a batch: features `[b f ...]` and their finite rows `[b]`, by end."""
        if not self.arrays:  # the first batch has the shapes
            self.arrays = [self.storage.allocate(self.num_images, x) for x, _ in batch]
        first = self._num_written
        count = min(self.batch_size, self.num_images - first)
        finite_by_end = self.devices.host([finite for _, finite in batch])
        for end, ((x, _), finite) in enumerate(zip(batch, finite_by_end, strict=True)):
            wrong = np.flatnonzero(~finite[:count])
            if len(wrong) and self.error:
                if end == len(batch) - 1:  # of this stage
                    raise self.error(first + int(wrong[0]))
                self.arrays[end] = None
            if (array := self.arrays[end]) is not None:
                self.arrays[end] = self.storage.write(array, x, first, count)
        self._num_written += count
