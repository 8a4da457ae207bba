"""Batch sizes: array shapes of a run's batches, and sizes that are too small or too large."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp

from jaxft.devices import Devices
from jaxft.errors import RecipeError
from jaxft.labels import Tree
from jaxft.models import Model, Norms
from jaxft.models.lora_model import without_lora
from jaxft.models.nnx_adapter import NNXModel
from jaxft.recipe import Recipe
from jaxft.stages import Stage


@dataclass(frozen=True)
class BatchSizes:
    """Rows of the arrays of full batches and of an epoch's last batch.

    The networks of jaxft ignore the rows outside a mask, so all their batches have one shape. A
    user's network may standardise images itself (zeros become NaN) or let rows influence each
    other. It sees the examples of a batch alone, and an epoch's last batch has another shape and a
    second compiled program, as in a loop over torch's `DataLoader`.

    Attributes:
      batch_size: examples of a full batch.
      last: examples of the last batch.
      rows: rows of a full batch's arrays, a multiple of the number of devices.
      last_rows: rows of the last batch's arrays.
      masked: whether the network takes batches with padding and a mask.
    """

    batch_size: int
    last: int
    rows: int
    last_rows: int
    masked: bool

    @property
    def examples(self) -> Mapping[int, int]:
        """Number of examples by number of rows; empty for a network that takes a mask."""
        return {} if self.masked else {self.rows: self.batch_size, self.last_rows: self.last}


def batch_sizes(
    model: Model, devices: Devices, images: int, batch_size: int, *, drop_last: bool = False
) -> BatchSizes:
    """Returns the sizes of batches that hold each image once; `images` is their number."""
    last = batch_size if drop_last else images % batch_size or batch_size
    rows = last_rows = devices.rows(batch_size)
    masked = isinstance(without_lora(model), NNXModel)
    if last < batch_size and not masked:
        last_rows = devices.rows(last)
        if last_rows == rows:  # a compiled program is chosen by the number of rows
            last_rows += len(devices)
    return BatchSizes(batch_size, last, rows, last_rows, masked)


def oversized(sizes: Sequence[BatchSizes], images: int) -> list[str]:
    """Returns a remark for each batch size above the number of images.

    A network that takes a mask computes all rows of a batch, also the empty ones.
    """
    larger = {each.batch_size for each in sizes if each.masked and each.batch_size > images}
    return [
        f"batch_size {size:,} is more than the {images:,} images to train on, and a step computes "
        f"{size:,} rows all the same: batch_size {images} takes less time and memory."
        for size in sorted(larger)
    ]


def check_single_image(
    model: Model,
    trees: tuple[Tree, Tree],
    norms: Norms,
    sizes: BatchSizes,
    *,
    image_size: int,
    accumulate: int = 1,
    replicas: int = 1,
    reaches_last: bool = True,
) -> None:
    """Checks that batch statistics are of more than one value per channel, as torch does.

    A batch, a part of it by `accumulate`, or the share of a replica may be a single image. Norm
    layers with batch statistics fail on it where they see 1x1 pixels.

    Args:
      trees: parameters and statistics, or their shapes.
      reaches_last: whether the stage has steps enough to see an epoch's last batch.

    Raises:
      RecipeError: a norm layer would see one value per channel.
    """
    part = sizes.batch_size // accumulate
    batches = {sizes.batch_size, *([sizes.last] if reaches_last else [])}
    parts = {count for n in batches for count in (min(part, n), n % part)}
    share = -(-part // replicas) if accumulate > 1 else sizes.rows // replicas
    shares = {min(share, n - i * share) for n in parts for i in range(replicas)}
    if 1 not in shares:
        return
    image = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    try:
        jax.eval_shape(partial(model.apply, norms=norms), *trees, image)
    except ValueError as error:
        if "more than one value per channel" not in str(error):
            raise
        where = "a batch" if part == sizes.batch_size else "a part of a batch"
        if sizes.last != sizes.batch_size:
            where += " (or of an epoch's last one)" if accumulate > 1 else ", or the last one,"
        raise RecipeError(
            f"{where} has a single image, on which {error}, as in torch. Set drop_last=True or "
            "another batch_size or accumulate, or norms 'frozen_eval' (frozen layers) or 'eval' "
            "(layers that train), which use running statistics."
        ) from error


@contextmanager
def fitting_memory(stage: Stage, recipe: Recipe, batch_size: int, model: Model) -> Iterator[None]:
    """Turns XLA's out-of-memory error into a RecipeError that names the recipe's ways out.

    `batch_size` is the stage's.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        line = str(error).partition("\n")[0]
        raise RecipeError(
            f"stage {stage.name!r}: a batch of {batch_size} images of "
            f"{recipe.preprocessing.image_size} pixels does not fit into the memory of "
            f"{jax.devices()[0].device_kind}: {line}\n"
            "What a run has saved stays. To need less memory:\n  "
            + "\n  ".join(_save_memory(stage, recipe, batch_size, model))
        ) from error


def _save_memory(stage: Stage, recipe: Recipe, batch_size: int, model: Model) -> list[str]:
    advice = []
    if not recipe.remat and len(model.blocks) > 2 and jax.default_backend() != "cpu":
        advice.append(
            "remat=True (--remat True) computes each block again in the backward pass: a forward "
            "pass more, the same results, and this run resumes with it."
        )
    if recipe.device_cache_mib != 0 and jax.default_backend() != "cpu":
        advice.append(
            "device_cache_mib=0 (--device-cache-mib 0) caches features of frozen layers in the "
            "memory of the hosts."
        )
    parts = 2 * stage.accumulate
    if batch_size % parts == 0:
        advice.append(
            f"accumulate={parts} in the stage works a batch through in {parts} parts: norm layers "
            "then see a part at a time. It is another recipe, for another --workdir."
        )
    advice.append(
        f"batch_size={max(1, batch_size // 2)} or smaller, with lower learning rates, is another "
        "recipe, too."
    )
    return advice
