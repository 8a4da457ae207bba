"""Batches of examples in a reproducible order, prepared ahead by threads.

A batch is a pure function of (seed, stage, epoch, index). Its examples and augmentations depend
neither on the number of threads or processes nor on where a run was resumed, so a checkpoint stores
only the position.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt8

from jaxft.data.augment import ENCODED_SIZE, View, check_view, resolve_view
from jaxft.data.class_balance import balanced_draws
from jaxft.data.prefetch import prefetch
from jaxft.data.preprocessing import Preprocessing, draw_view, eval_view, train_view
from jaxft.data.process_source import ProcessSource
from jaxft.data.source import Source, Target, pixel_type
from jaxft.data.worker import write_row
from jaxft.data.worker_processes import Rows
from jaxft.errors import DataError
from jaxft.stage_options import Augment

# Last word of the seed of an augmentation. It must not be 0: NumPy's SeedSequence treats
# [seed, stage, epoch], the seed of the order, like [seed, stage, epoch, 0, 0].
_AUGMENTATION = 1


class Crops(NamedTuple):
    """In place of images: their crops, and the steps for `device_augment.augment_batch`."""

    images: UInt8[np.ndarray | jax.Array, "b h w 3"] | Float[np.ndarray | jax.Array, "b h w 3"]
    steps: Float32[np.ndarray | jax.Array, "b 9"]


class Batch(NamedTuple):
    """A batch: NumPy arrays on the host, jax arrays on a device.

    Rows where `mask` is False are padding with zeros. Stacked batches have one more leading axis.
    """

    image: UInt8[np.ndarray | jax.Array, "b h w 3"] | Float[np.ndarray | jax.Array, "b ..."]
    """uint8 images, float images that are already normalised, or features; or `Crops`."""
    target: Int32[np.ndarray | jax.Array, " b"] | Int32[np.ndarray | jax.Array, "b k"]
    """Classes; or 0 or 1 for each class."""
    mask: Bool[np.ndarray | jax.Array, " b"]


def steps_per_epoch(source: Source, batch_size: int, *, drop_last: bool = False) -> int:
    """Returns the number of batches in an epoch.

    With `drop_last`, a last batch that is not full is left out, as in torch's `DataLoader`.

    Raises:
      DataError: `drop_last` leaves no batch.
    """
    if not drop_last:
        return -(-len(source) // batch_size)
    if len(source) < batch_size:
        raise DataError(
            f"drop_last leaves nothing of {len(source)} images in batches of {batch_size}: "
            f"set batch_size to at most {len(source)}, or drop_last to False."
        )
    return len(source) // batch_size


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Everything that the training batches of a stage depend on, apart from the images.

    Attributes:
      preprocessing: size and interpolation of the images.
      augment: random view of each image.
      batch_size: examples per batch.
      seed: seed of the order and the augmentations.
      stage: index of the stage, part of the seed.
      drop_last: leave out the last batch of an epoch if it is not full.
      balanced: draw an epoch's examples with replacement, all classes equally often
        (`jaxft.data.class_balance`). Repeated examples are augmented differently.
      num_views: repeat the views of an example after this many epochs; 0 never repeats them.
      augment_on_device: if `View.runs_on_device`, only crop the images: batches hold `Crops`.
      rows: rows of the arrays, `batch_size` by default; surplus rows are padding.
      last_rows: rows of an epoch's last batch if it is not full, `rows` by default.
      shard: (index, count) of this process. Each process prepares an equal part of the rows and
        decodes no other images; the parts of all processes, concatenated, are the batch.
    """

    preprocessing: Preprocessing
    augment: Augment | View
    batch_size: int
    seed: int
    stage: int
    drop_last: bool = False
    balanced: bool = False
    num_views: int = 0
    augment_on_device: bool = False
    rows: int | None = None
    last_rows: int | None = None
    shard: tuple[int, int] = (0, 1)


def train_batches(
    source: Source,
    config: BatchConfig,
    *,
    epochs: int,
    first_epoch: int = 0,
    first_step: int = 0,
    workers: int = 0,
    features: Callable[[int], np.ndarray] | None = None,
) -> Generator[Batch, None, None]:
    """Yields the training batches of a stage, epoch by epoch.

    An epoch holds every example once, in a random order. To stop early, close the generator
    (`contextlib.closing`).

    Args:
      source: labelled images.
      config: order, augmentation and shape of the batches.
      epochs: number of epochs of the stage.
      first_epoch: epoch to start from, to resume a run.
      first_step: batch of `first_epoch` to start from.
      workers: threads that prepare batches ahead; 0 prepares a batch when it is requested.
      features: returns the features [n ...] of all examples for one view. The batches then hold
        these features instead of images, and use no threads.

    Raises:
      DataError: as `steps_per_epoch`; or the rows are too few, or not divisible by the number of
        processes; or, when its batch is requested, an image is unreadable.
    """
    batch_size, seed, stage = config.batch_size, config.seed, config.stage
    steps = steps_per_epoch(source, batch_size, drop_last=config.drop_last)
    process_rows = _process_rows(
        len(source), batch_size, config.rows, config.last_rows, config.shard
    )

    # Around the end of an epoch, threads prepare batches of two epochs.
    @lru_cache(maxsize=2)
    def epoch_order(epoch: int) -> np.ndarray:
        rng = np.random.default_rng([seed, stage, epoch])
        return balanced_draws(source, rng) if config.balanced else rng.permutation(len(source))

    def select(step: int) -> tuple[np.ndarray, np.ndarray, int, slice]:
        epoch, index = divmod(step, steps)
        row_range = process_rows(index)
        view = view_of_epoch(epoch, config.num_views)
        first = index * batch_size
        positions = np.arange(first, min(first + batch_size, len(source)))[row_range]
        return epoch_order(epoch)[positions], positions, view, row_range

    def select_rows(step: int) -> Rows:
        examples, positions, view, row_range = select(step)
        # A balanced epoch may repeat an example; its position then varies the view.
        varying = [examples, positions] if config.balanced else [examples]
        numbers = zip(*(each.tolist() for each in varying), strict=True)
        arguments = [(example, view, *position) for example, *position in numbers]
        return Rows(arguments, row_range.stop - row_range.start)

    def feature_batch(step: int) -> Batch:
        assert features
        examples, _, view, row_range = select(step)
        return _feature_batch(features(view), source, examples, row_range)

    check_view(source, config.augment)
    remaining_steps = range(first_epoch * steps + first_step, epochs * steps)
    if features:
        return prefetch(feature_batch, remaining_steps, 0)
    on_device = config.augment_on_device and resolve_view(config.augment).runs_on_device
    load = _TrainViews(source, config.preprocessing, config.augment, seed, stage, on_device)
    size = config.preprocessing.image_size
    return _image_batches(source, load, select_rows, remaining_steps, size, workers, on_device)


@dataclass(frozen=True)
class _TrainViews:
    """Function of an example, a view and perhaps a position; see `train_view_loader`."""

    source: Source
    preprocessing: Preprocessing
    augment: Augment | View
    seed: int
    stage: int
    on_device: bool = False

    def __call__(self, example: int, view: int, *position: int) -> tuple[Any, ...]:
        seed = [self.seed, self.stage, view, example, _AUGMENTATION, *position]
        image, target = self.source[example]
        rng = np.random.default_rng(seed)
        if self.on_device:
            crop, steps = draw_view(image, self.preprocessing, resolve_view(self.augment), rng)
            return np.asarray(crop), target, steps.encoded()
        return train_view(image, self.preprocessing, self.augment, rng), target


def view_of_epoch(epoch: int, num_views: int) -> int:
    """Returns the number of an epoch's views; `num_views` as in `BatchConfig`."""
    return epoch % num_views if num_views else epoch


def train_view_loader(
    source: Source, preprocessing: Preprocessing, augment: Augment | View, *, seed: int, stage: int
) -> Callable[..., tuple[np.ndarray, Target]]:
    """Returns the function `load(example, view, *position)` of a stage's augmented images.

    `load` returns the image [h w 3] of an example and its target. `view` is the number of the view,
    equal to the epoch unless views repeat; `position` is the position in a balanced epoch.
    """
    return _TrainViews(source, preprocessing, augment, seed, stage)


@dataclass(frozen=True)
class _EvalViews:
    """Function from an example to its evaluation view and target."""

    source: Source
    preprocessing: Preprocessing

    def __call__(self, example: int) -> tuple[np.ndarray, Target]:
        image, target = self.source[example]
        return eval_view(image, self.preprocessing), target


def eval_batches(
    source: Source,
    preprocessing: Preprocessing,
    *,
    batch_size: int,
    workers: int,
    load: Callable[[int], tuple[np.ndarray, Target]] | None = None,
    features: np.ndarray | None = None,
    rows: int | None = None,
    last_rows: int | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Generator[Batch, None, None]:
    """Yields batches of every example once, in the source's order, without augmentation.

    Args:
      source: labelled images.
      preprocessing: size and interpolation of the images.
      batch_size: examples per batch.
      workers: as in `train_batches`.
      load: returns the image [h w 3] of an example and its target, in place of the evaluation view.
      features: [n ...] of all examples; the batches then hold these instead of images.
      rows, last_rows, shard: as in `BatchConfig`.

    Raises:
      DataError: as in `train_batches`.
    """
    process_rows = _process_rows(len(source), batch_size, rows, last_rows, shard)

    def select(step: int) -> tuple[np.ndarray, slice]:
        row_range = process_rows(step)
        first = step * batch_size
        return np.arange(first, min(first + batch_size, len(source)))[row_range], row_range

    def select_rows(step: int) -> Rows:
        examples, row_range = select(step)
        return Rows([(example,) for example in examples.tolist()], row_range.stop - row_range.start)

    def feature_batch(step: int) -> Batch:
        assert features is not None
        return _feature_batch(features, source, *select(step))

    steps = range(steps_per_epoch(source, batch_size))
    if features is not None:
        return prefetch(feature_batch, steps, 0)
    load = load or _EvalViews(source, preprocessing)
    return _image_batches(source, load, select_rows, steps, preprocessing.image_size, workers)


def _process_rows(
    num_images: int,
    batch_size: int,
    rows: int | None,
    last_rows: int | None,
    shard: tuple[int, int],
) -> Callable[[int], slice]:
    """Returns a function from a batch's index in its epoch to this process's rows."""
    full = last = _shard_rows(batch_size, rows, shard)
    if last_rows is not None:
        last = _shard_rows(num_images % batch_size, last_rows, shard)
    return lambda index: full if (index + 1) * batch_size <= num_images else last


def _shard_rows(batch_size: int, rows: int | None, shard: tuple[int, int]) -> slice:
    """Returns the rows of a batch that belong to process `index` of `count`."""
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
    size = rows // count
    return slice(index * size, (index + 1) * size)


def _image_batches(
    source: Source,
    load: Callable[..., tuple[Any, ...]],
    rows: Callable[[int], Rows],
    steps: range,
    image_size: int,
    workers: int,
    on_device: bool = False,
) -> Generator[Batch, None, None]:
    """Yields the batch of each step, prepared by the source's worker processes or by threads."""
    side, target_shape = image_size, source.targets.shape[1:]
    row_types = [(pixel_type(source).str, (side, side, 3)), ("<i4", target_shape)]
    if on_device:
        row_types.append(("<f4", (ENCODED_SIZE,)))

    def batch(arrays: Sequence[np.ndarray], mask: np.ndarray) -> Batch:
        images, targets, *steps = arrays
        return Batch(Crops(images, *steps) if steps else images, targets, mask)  # type: ignore[arg-type]

    if isinstance(source, ProcessSource):
        return (batch(*each) for each in source.workers.prefetch(load, rows, steps, row_types))

    def make_batch(step: int) -> Batch:
        arguments, num_rows = rows(step)
        arrays = [np.zeros((num_rows, *shape), dtype) for dtype, shape in row_types]
        for row, each in enumerate(arguments):
            write_row(arrays, row, load(*each))
        return batch(arrays, np.arange(num_rows) < len(arguments))

    return prefetch(make_batch, steps, workers)


def _feature_batch(
    features: np.ndarray, source: Source, examples: np.ndarray, row_range: slice
) -> Batch:
    num_rows, num_examples = row_range.stop - row_range.start, len(examples)
    rows = np.empty((num_rows, *features.shape[1:]), features.dtype)
    # With its default mode, `take` would copy the rows twice.
    np.take(features, examples, 0, out=rows[:num_examples], mode="clip")
    rows[num_examples:] = 0
    targets = np.asarray(source.targets[examples], np.int32)
    targets = np.pad(targets, ((0, num_rows - num_examples), *[(0, 0)] * (targets.ndim - 1)))
    return Batch(rows, targets, np.arange(num_rows) < num_examples)
