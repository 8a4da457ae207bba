"""Evaluation: every example counts once, whatever the batch size."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxft.data import Batch, Preprocessing
from jaxft.labels import Tree
from jaxft.models import Model
from jaxft.train.execution import one_by_one
from jaxft.train.metrics import Metrics


def eval_step(
    model: Model,
    preprocessing: Preprocessing,
    *,
    tta: Literal["none", "flip"] = "none",
    first: str | None = None,
    places: int = 1,
    examples: Mapping[int, int] | None = None,
) -> Any:
    """Returns the jitted `(params, stats, batch) -> metrics`, which uses running statistics.

    With `tta="flip"`, test-time augmentation, the logits are averaged over an image and its mirror.
    Logits, as torchvision's `TenCrop` example does, not probabilities: the mean is logits again, to
    which loss and calibration apply as to any, and its loss is never above the mean of the two.

    Beginning with the block `first`, a batch has instead of images what the blocks before it make
    of each and, or not, of its mirror: [b v ...].

    With more `places` than one, so many batches are stacked, and their metrics too; the last
    argument is how many of them there are.

    examples: see `train_step`.
    """

    def step(params: Tree, stats: Tree, batch: Batch) -> Metrics:
        if examples:
            count = examples[len(batch.mask)]
            batch = jax.tree.map(lambda x: x[:count], batch)
        if first is None:
            images = preprocessing.normalize(batch.image)
            views = [images, images[:, :, ::-1]] if tta == "flip" else [images]
        else:
            views = [jnp.asarray(batch.image)[:, i] for i in range(batch.image.shape[1])]
        run = partial(model.apply, params, stats, norms="running", first=first)
        logits = [run(view)[0] for view in views]
        return Metrics.of_batch(sum(logits[1:], logits[0]) / len(logits), batch.target, batch.mask)

    def steps(params: Tree, stats: Tree, batches: Batch, count: jax.Array) -> Metrics:
        def further(_: None, batch: Batch, i: jax.Array) -> tuple[None, Metrics]:
            return None, step(params, stats, batch)

        return one_by_one(further, None, batches, count)[1]

    return jax.jit(step if places == 1 else steps)
