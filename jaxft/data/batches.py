"""Batches in a reproducible order, prepared by threads ahead of their use.

A batch is a pure function of (seed, stage, epoch, index): its examples and their augmentation
depend neither on the number of threads nor on where a run was resumed, so a checkpoint needs
to store only its position.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from functools import lru_cache
from typing import NamedTuple

import grain
import numpy as np

from jaxft.data.preprocessing import Augment, Preprocessing, eval_view, train_view
from jaxft.data.sources import Source

# The last word of the seed of an augmentation. It must not be 0: to NumPy's SeedSequence,
# [seed, stage, epoch], the seed of the order, is the same as [seed, stage, epoch, 0, 0].
_AUGMENTATION = 1


class Batch(NamedTuple):
    """NumPy arrays of one batch; rows where `mask` is False are padding (zeros)."""

    image: np.ndarray
    """uint8 [b h w 3], not yet normalised."""
    target: np.ndarray
    """int32 [b]."""
    mask: np.ndarray
    """bool [b], False for the padding at the end of an epoch's last batch."""


def steps_per_epoch(source: Source, batch_size: int) -> int:
    """Batches that hold every example once; the last one may be padded."""
    return -(-len(source) // batch_size)


def train_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    augment: Augment,
    batch_size: int,
    seed: int,
    stage: int,
    epochs: int,
    first_epoch: int = 0,
    workers: int,
) -> Generator[Batch, None, None]:
    """The batches of a stage's epochs `first_epoch`, ..., `epochs - 1`, one after another.

    Each epoch is `steps_per_epoch` batches with every example once, in an order of its own.
    `workers` threads prepare batches ahead; 0 prepares each when it is asked for. To stop
    early, `close()` the generator (`contextlib.closing`): threads end with the batch in hand.

    Raises:
      DataError: when the batch that meets an unreadable image is asked for.
    """
    steps = steps_per_epoch(source, batch_size)

    # Two epochs are in the making around each boundary between them.
    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng([seed, stage, epoch]).permutation(len(source))

    def make_batch(step: int) -> Batch:
        epoch, index = divmod(step, steps)

        def view(example: int) -> tuple[np.ndarray, int]:
            rng = np.random.default_rng([seed, stage, epoch, example, _AUGMENTATION])
            image, target = source[example]
            return train_view(image, preprocessing, augment, rng), target

        examples = order(epoch)[index * batch_size : (index + 1) * batch_size]
        return _assemble(examples, view, preprocessing.image_size, batch_size)

    return _prefetch(make_batch, range(first_epoch * steps, epochs * steps), workers)


def eval_batches(
    source: Source, preprocessing: Preprocessing, *, batch_size: int, workers: int
) -> Generator[Batch, None, None]:
    """Every example once in the source's order, unaugmented; otherwise as `train_batches`."""

    def view(example: int) -> tuple[np.ndarray, int]:
        image, target = source[example]
        return eval_view(image, preprocessing), target

    def make_batch(step: int) -> Batch:
        examples = np.arange(step * batch_size, min((step + 1) * batch_size, len(source)))
        return _assemble(examples, view, preprocessing.image_size, batch_size)

    return _prefetch(make_batch, range(steps_per_epoch(source, batch_size)), workers)


def _assemble(
    examples: np.ndarray,
    view: Callable[[int], tuple[np.ndarray, int]],
    image_size: int,
    batch_size: int,
) -> Batch:
    images = np.zeros((batch_size, image_size, image_size, 3), np.uint8)
    targets = np.zeros(batch_size, np.int32)
    for row, example in enumerate(examples):
        images[row], targets[row] = view(int(example))
    return Batch(images, targets, np.arange(batch_size) < len(examples))


def _prefetch(
    make_batch: Callable[[int], Batch], steps: range, workers: int
) -> Generator[Batch, None, None]:
    """`make_batch` of each step in order, made by threads: Pillow decodes without the GIL."""
    dataset = grain.MapDataset.range(steps.start, steps.stop).map(make_batch)
    # Two batches a thread: one in the making, one ready. More would only hold memory.
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    with closing(iter(dataset.to_iter_dataset(options))) as batches:
        yield from batches
