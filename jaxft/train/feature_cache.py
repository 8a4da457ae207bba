"""What prefixes have made of a run's images, and images to validate, as long as the process lives.

What a prefix made is keyed by the images and their views, and by the bytes of all weights and
statistics that it came through: what no longer holds is never found. Nothing of it is saved; a run
that goes on makes it again, to the same last bit.
"""

import hashlib
import math
import os
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Hashable
from contextlib import closing
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Source
from jaxft.data.batches import augmented
from jaxft.errors import NonFiniteError, RecipeError
from jaxft.labels import paths
from jaxft.train.frozen_prefix import block_labels
from jaxft.train.norms import layer
from jaxft.train.stage_program import Compiled, Program

if TYPE_CHECKING:
    from jaxft.train.trainer import Run

Half = Literal["train", "val"]


class Kept:
    """Trees of arrays by their keys, up to a number of bytes; the longest unused go first.

    on_disk: whether arrays that it makes lie there.
    """

    def __init__(self, max_bytes: int, *, on_disk: bool = False) -> None:
        self._max = self._free = max_bytes
        self._on_disk = on_disk
        self._trees: dict[Hashable, Any] = {}

    def get(self, key: Hashable) -> Any:
        """What is kept by that key; None if nothing is."""
        if key not in self._trees:
            return None
        self._trees[key] = self._trees.pop(key)  # now the last of them
        return self._trees[key]

    def add(self, key: Hashable, tree: Any) -> None:
        """Keeps it, unless it is larger than all there may be."""
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
        """An array to be filled; on disk it is a file without a name, which goes when it does.

        Raises RecipeError if the disk has no room for it.
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
        """So many batches; if all have been seen before, and there was room, from memory."""
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


class Inputs:
    """What the steps of a stage begin with, and its validation, where its prefix is kept.

    run, program, compiled: the stage's.
    at: gives arrays in which the prefix is as it is all through the stage.
    """

    def __init__(
        self, run: "Run", program: Program, compiled: Compiled, at: Callable[[], Snapshot]
    ) -> None:
        self._run, self._program, self._compiled, self._at = run, program, compiled, at
        self.batch_size = program.recipe.batch_size
        self.score = compiled.score
        """`(params, stats, batch) -> metrics`, of batches of `val`; none if that is not kept."""

    def train(self, view: int = 0) -> np.ndarray:
        """[n ...] of a view of the images to train on.

        Raises InterruptedRunError if a signal comes while they are made.
        """
        own = None if self._program.same_views else (self._program.index, view)
        rows = self._rows("train", own)
        if rows is None:
            raise self._run.stopped()
        return rows[:, 0]

    def val(self) -> np.ndarray | None:
        """[n v ...] of the images to validate, where v is 2 if the mirror of each is seen too.

        None if a signal comes while they are made.
        """
        return self._rows("val", None)

    def _rows(self, half: Half, view: tuple[int, int] | None) -> np.ndarray | None:
        size = self.batch_size  # by which an output may differ in its last bits
        *taps, own = ((half, view, size, self._digests[end]) for end in self._program.prefix.ends)
        found = self._run.kept.get(own)
        if found is None:
            made = self._made(half, view)
            for key, rows in zip((*taps, own), made or (), strict=made is not None):
                self._run.kept.add(key, rows)
            found = made[-1] if made else None
        return found

    def _made(self, half: Half, view: tuple[int, int] | None) -> list[np.ndarray] | None:
        """By a pass over the images, for each of the prefix's ends; None if a signal comes.

        Raises NonFiniteError for features that are not finite, unless the recipe skips them.
        """
        run, recipe = self._run, self._program.recipe
        source: Source = getattr(run.splits, half)
        sides = (1, -1) if half == "val" and recipe.tta == "flip" else (1,)
        params, stats, _ = self._at()
        arrays: list[np.ndarray] = []
        waiting: deque[list[tuple[list[jax.Array], jax.Array]]] = deque()
        done = 0

        def outputs(x: jax.Array) -> tuple[list[jax.Array], jax.Array]:
            found = []
            for block, compute in self._compiled.prefix.items():
                x = compute(params, stats, x)
                if block in self._program.prefix.ends:
                    found.append(x)
            return found, finite_rows(x)

        def store() -> None:
            nonlocal done
            by_side, finite = zip(*run.devices.host(waiting.popleft()), strict=True)
            made = [np.stack(both, 1) for both in zip(*by_side, strict=True)]
            if not arrays:
                of_all = ((len(source), *x.shape[1:]) for x in made)
                arrays.extend(map(run.kept.empty, of_all, (x.dtype for x in made)))
            count = min(recipe.batch_size, len(source) - done)
            wrong = np.flatnonzero(~np.all(finite, 0)[:count])
            if len(wrong) and recipe.on_nonfinite == "stop":
                raise self._not_finite(half, done + int(wrong[0]), len(source))
            for array, rows in zip(arrays, made, strict=True):
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
            of_stage = augmented(
                source, recipe.preprocessing, recipe.augment, seed=recipe.seed, stage=stage
            )
            drawn = partial(of_stage, number=number)
        size = recipe.batch_size
        if run.of_each_batch(source, through, batch_size=size, view=drawn) is None:
            return None
        store()
        return arrays

    def _not_finite(self, half: Half, image: int, images: int) -> NonFiniteError:
        use, skipping = {
            "train": ("train on", "leaves steps with it out"),
            "val": ("validate", "has no epoch as the best whose validation is not finite"),
        }[half]
        stage, blocks = self._program.plan.stage, self._program.prefix.blocks
        where = f"blocks {blocks[0]} to {blocks[-1]}" if len(blocks) > 1 else f"block {blocks[0]}"
        way_out = f" With --on-nonfinite skip the same command goes on and {skipping}."
        return NonFiniteError(
            f"stage {stage.name!r}: the features of image {image} (of {images} to {use}, counted "
            f"from 0), as its frozen {where} compute them, are not finite. Look at that image, at "
            "the weights (large ones overflow) and at the running statistics."
            + ("" if stage.solver else way_out)
        )

    @cached_property
    def _digests(self) -> dict[str, str]:
        """For the last block of each prefix, the hash of all arrays up to there."""
        params, stats, _ = self._run.devices.host(self._at()._replace(opt_state=None))
        of_params = jax.tree.leaves(block_labels(self._program.model, params))
        of_layer = dict(zip(map(layer, paths(params)), of_params, strict=True))
        of_stats = [of_layer[layer(path)] for path in paths(stats)]
        leaves = [*jax.tree.leaves(params), *jax.tree.leaves(stats)]
        sofar, digests = hashlib.sha256(), {}
        for block in self._program.prefix.blocks:
            for own, leaf in zip((*of_params, *of_stats), leaves, strict=True):
                if own == block:
                    sofar.update(np.asarray(leaf).tobytes())
            digests[block] = sofar.hexdigest()
        return digests
