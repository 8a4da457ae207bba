"""Batches in a reproducible order, prepared by threads ahead of their use.

A batch is a pure function of (seed, stage, epoch, index): its examples and their augmentation
depend neither on the number of threads or processes nor on where a run was resumed, so a
checkpoint needs to store only its position.
"""

from collections.abc import Callable, Generator, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.augment import View, check_view
from jaxft.data.class_balance import balanced_draws
from jaxft.data.prefetch import prefetch
from jaxft.data.preprocessing import Preprocessing, eval_view, train_view
from jaxft.data.source import Source, pixel_type
from jaxft.errors import DataError
from jaxft.stage_options import Augment

# The last word of the seed of an augmentation. It must not be 0: to NumPy's SeedSequence,
# [seed, stage, epoch], the seed of the order, is the same as [seed, stage, epoch, 0, 0].
_AUGMENTATION = 1


class Batch(NamedTuple):
    """NumPy arrays of one batch; rows where `mask` is False are padding (zeros)."""

    image: np.ndarray
    """uint8 [b h w 3], not yet normalised, or float32 if the source's are normalised; or what is
    kept of the images, [b ...]."""
    target: np.ndarray
    """int32 [b]."""
    mask: np.ndarray
    """bool [b], False for the padding at the end of an epoch's last batch."""


def steps_per_epoch(source: Source, batch_size: int, *, drop_last: bool = False) -> int:
    """Batches that hold every example once; the last one may be padded.

    With `drop_last`, a batch that would need padding is left out, as by torch's `DataLoader`.

    Raises:
      DataError: that leaves none.
    """
    if not drop_last:
        return -(-len(source) // batch_size)
    if len(source) < batch_size:
        raise DataError(
            f"drop_last leaves nothing of {len(source)} images in batches of {batch_size}: "
            f"set batch_size to at most {len(source)}, or drop_last to False."
        )
    return len(source) // batch_size


def train_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    augment: Augment | View,
    batch_size: int,
    seed: int,
    stage: int,
    epochs: int,
    first_epoch: int = 0,
    first_step: int = 0,
    workers: int,
    drop_last: bool = False,
    balanced: bool = False,
    views: int = 0,
    kept: Callable[[int], np.ndarray] | None = None,
    rows: int | None = None,
    last_rows: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """The batches of a stage's epochs `first_epoch`, ..., `epochs - 1`, one after another.

    Each epoch is `steps_per_epoch` batches with every example once, in an order of its own; the
    first is entered at its step `first_step`, where a run was interrupted. `workers` threads
    prepare batches ahead; 0 prepares each when it is asked for. To stop early, `close()` the
    generator (`contextlib.closing`): threads end with the batch in hand.

    If `balanced`, an epoch is as long but draws with replacement, each class as often as another
    (`jaxft.data.class_balance`); what is drawn twice is augmented anew.

    With `views`, there are but so many of each example: an epoch's are those of the epoch so many
    before. `kept(view)` is what is kept of each example's view of that number, [n ...]: batches are
    of these rows instead of images, and made when they are asked for.

    A batch's arrays have `rows` rows, `batch_size` by default; those beyond its examples are
    padding. An epoch's last batch, if it is not full, has `last_rows` instead. With `shard`
    (i, n), process i of n makes its n-th part of these rows and decodes no others: the parts of all
    processes, one after another, are the batch.

    Raises:
      DataError: the rows do not divide into n parts or do not hold a batch, or as
        `steps_per_epoch`; later, when the batch that meets an unreadable image is asked for.
    """
    steps = steps_per_epoch(source, batch_size, drop_last=drop_last)
    part_of = _parts(len(source), batch_size, rows, last_rows, shard)

    # Two epochs are in the making around each boundary between them.
    @lru_cache(maxsize=2)
    def order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, stage, epoch])
        return balanced_draws(source, rng) if balanced else rng.permutation(len(source))

    def make_batch(step: int) -> Batch:
        epoch, index = divmod(step, steps)
        part = part_of(index)
        number = epoch % views if views else epoch
        places = np.arange(index * batch_size, min((index + 1) * batch_size, len(source)))[part]
        examples = order(epoch)[places]
        if kept:
            return _taken(kept(number), source, examples, part)

        def view(example: int, place: int) -> tuple[np.ndarray, int]:
            # Only there does an epoch hold an example more than once.
            which = (place,) if balanced else ()
            return make_view(example, number, *which)

        drawn = zip(examples.tolist(), places.tolist(), strict=True)
        made = [partial(view, *e) for e in drawn]
        return _assemble(made, preprocessing.image_size, part, pixel_type(source))

    check_view(source, augment)
    make_view = augmented(source, preprocessing, augment, seed=seed, stage=stage)
    numbers = range(first_epoch * steps + first_step, epochs * steps)
    return prefetch(make_batch, numbers, 0 if kept else workers)


def augmented(
    source: Source, preprocessing: Preprocessing, augment: Augment | View, *, seed: int, stage: int
) -> Callable[..., tuple[np.ndarray, int]]:
    """`(example, number, *place) -> (image, target)`: the views of a stage, by their epochs."""

    def view(example: int, number: int, *place: int) -> tuple[np.ndarray, int]:
        rng = np.random.default_rng([seed, stage, number, example, _AUGMENTATION, *place])
        image, target = source[example]
        return train_view(image, preprocessing, augment, rng), target

    return view


def eval_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int,
    view: Callable[[int], tuple[np.ndarray, int]] | None = None,
    kept: np.ndarray | None = None,
    rows: int | None = None,
    last_rows: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """Every example once in the source's order, unaugmented; otherwise as `train_batches`.

    view: gives an example's image, where it is to be another, and its target.
    kept: as there, of all examples.
    """
    part_of = _parts(len(source), batch_size, rows, last_rows, shard)

    def evaluated(example: int) -> tuple[np.ndarray, int]:
        image, target = source[example]
        return eval_view(image, preprocessing), target

    def make_batch(step: int) -> Batch:
        part = part_of(step)
        examples = np.arange(step * batch_size, min((step + 1) * batch_size, len(source)))[part]
        if kept is not None:
            return _taken(kept, source, examples, part)
        views = [partial(view or evaluated, example) for example in examples.tolist()]
        return _assemble(views, preprocessing.image_size, part, pixel_type(source))

    steps = range(steps_per_epoch(source, batch_size))
    return prefetch(make_batch, steps, workers if kept is None else 0)


def _parts(
    images: int,
    batch_size: int,
    rows: int | None,
    last_rows: int | None,
    shard: tuple[int, int],
) -> Callable[[int], slice]:
    """Returns, by a batch's index in its epoch, the rows of it that a process makes."""
    full = last = _part(batch_size, rows, shard)
    if last_rows is not None:
        last = _part(images % batch_size, last_rows, shard)
    return lambda index: full if (index + 1) * batch_size <= images else last


def _part(batch_size: int, rows: int | None, shard: tuple[int, int]) -> slice:
    """The rows of a batch that process `index` of `count` makes."""
    index, count = shard
    if not 0 <= index < count:
        raise DataError(f"shard {shard} is not (index, count) with 0 <= index < count.")
    if rows is None:
        rows = batch_size
    if rows < batch_size:
        raise DataError(f"batches of {batch_size} do not fit into {rows} rows.")
    if rows % count:
        raise DataError(
            f"batches of {rows} rows do not divide among {count} processes: set rows to a multiple "
            f"of {count}."
        )
    share = rows // count
    return slice(index * share, (index + 1) * share)


def _assemble(
    views: Sequence[Callable[[], tuple[np.ndarray, int]]],
    image_size: int,
    part: slice,
    dtype: np.dtype[Any],
) -> Batch:
    count = part.stop - part.start
    images = np.zeros((count, image_size, image_size, 3), dtype)
    targets = np.zeros(count, np.int32)
    for row, view in enumerate(views):
        images[row], targets[row] = view()
    return Batch(images, targets, np.arange(count) < len(views))


def _taken(kept: np.ndarray, source: Source, examples: np.ndarray, part: slice) -> Batch:
    count, spare = len(examples), part.stop - part.start - len(examples)
    padding = ((0, spare), *[(0, 0)] * (kept.ndim - 1))
    targets = np.pad(np.asarray(source.targets[examples], np.int32), (0, spare))
    return Batch(np.pad(kept[examples], padding), targets, np.arange(count + spare) < count)
