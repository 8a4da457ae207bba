"""The evaluation step: every example counts once, whatever the batch size."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxft.data import Batch, Preprocessing
from jaxft.labels import Tree
from jaxft.losses import LossChoice
from jaxft.matmul_precision import MatmulPrecision, with_precision
from jaxft.models import Model
from jaxft.steps_per_execution import one_by_one
from jaxft.train.metrics import Metrics


def eval_step(
    model: Model,
    preprocessing: Preprocessing,
    *,
    tta: Literal["none", "flip"] = "none",
    first: str | None = None,
    steps_per_call: int = 1,
    examples: Mapping[int, int] | None = None,
    loss: LossChoice = "cross_entropy",
    metrics: Sequence[str] = (),
    precision: MatmulPrecision = "default",
) -> Any:
    """Returns the jitted `(params, stats, batch) -> metrics`, which uses running statistics.

    Args:
      model: the network.
      preprocessing: normalises the images.
      tta: `flip` averages the logits over an image and its mirror. It averages logits, as
        torchvision's `TenCrop` example does, and not probabilities, so that loss and calibration
        apply to the result; its cross entropy is never above the mean of the two.
      first: first block to run, if batches hold features of the blocks before it: `[b v ...]`, with
        one or two views (the mirror) of each image.
      steps_per_call: above 1, batches are stacked, and so are their metrics; the last argument is
        the number of batches.
      examples: see `jaxft.train.train_step.StepConfig`.
      loss: loss of an example, which is neither smoothed nor weighted.
      metrics: functions of the user, see `jaxft.example_function`.
      precision: of float32 products.
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
        mean = sum(logits[1:], logits[0]) / len(logits)
        return Metrics.of_batch(mean, batch.target, batch.mask, loss, metrics)

    def steps(params: Tree, stats: Tree, batches: Batch, count: jax.Array) -> Metrics:
        def one(_: None, batch: Batch, i: jax.Array) -> tuple[None, Metrics]:
            return None, step(params, stats, batch)

        return one_by_one(one, None, batches, count)[1]

    return jax.jit(with_precision(step if steps_per_call == 1 else steps, precision))
