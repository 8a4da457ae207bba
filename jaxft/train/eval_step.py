"""The evaluation step: every example counts once, whatever the batch size."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxft.batch_sizes import BatchSizes
from jaxft.data import Batch, Preprocessing
from jaxft.labels import Tree
from jaxft.losses import LossChoice
from jaxft.matmul_precision import MatmulPrecision, with_precision
from jaxft.models import Model
from jaxft.recipe import Recipe
from jaxft.steps_per_execution import one_by_one
from jaxft.train.metrics import Metrics

Tta = Literal["none", "flip"]
"""Test-time augmentation: none, or also the mirror image."""


def image_views(images: jax.Array, tta: Tta) -> list[jax.Array]:
    """Returns the views of normalised images `[b h w 3]` that an evaluation averages over."""
    return [images, images[:, :, ::-1]] if tta == "flip" else [images]


def mean_logits(
    model: Model, params: Tree, stats: Tree, views: Sequence[jax.Array], *, first: str | None = None
) -> jax.Array:
    """Returns the logits `[b k]` of the network with running statistics, averaged over views.

    It averages logits, as torchvision's `TenCrop` example does, and not probabilities, so that loss
    and calibration apply to the result; its cross entropy is never above the mean of the views'.

    Args:
      model: the network.
      params, stats: its weights.
      views: inputs of the network, or of its block `first`, `[b ...]` each.
      first: first block to run.
    """
    run = partial(model.apply, params, stats, norms="running", first=first)
    logits = [run(view)[0] for view in views]
    return sum(logits[1:], logits[0]) / len(logits)


def eval_step(
    model: Model,
    preprocessing: Preprocessing,
    *,
    tta: Tta = "none",
    first: str | None = None,
    steps_per_call: int = 1,
    examples: Mapping[int, int] | None = None,
    loss: LossChoice = "cross_entropy",
    metrics: Sequence[str] = (),
    precision: MatmulPrecision = "default",
    take: Callable[[jax.Array, Batch], jax.Array] | None = None,
) -> Any:
    """Returns the jitted `(params, stats, batch) -> metrics`, which uses running statistics.

    Args:
      model: the network.
      preprocessing: normalises the images.
      tta: see `mean_logits`.
      first: first block to run, if batches hold features of the blocks before it: `[b v ...]`, with
        one or two views (the mirror) of each image.
      steps_per_call: above 1, batches are stacked, and so are their metrics; the last argument is
        the number of batches.
      examples: see `jaxft.train.train_step.StepConfig`.
      loss: loss of an example, which is neither smoothed nor weighted.
      metrics: functions of the user, see `jaxft.example_function`.
      precision: of float32 products.
      take: returns the features of a batch that holds indices, from the step's last argument.
    """

    def step(params: Tree, stats: Tree, batch: Batch, features: jax.Array | None = None) -> Metrics:
        if features is not None:
            assert take
            batch = batch._replace(image=take(features, batch))
        if examples:
            count = examples[len(batch.mask)]
            batch = jax.tree.map(lambda x: x[:count], batch)
        if first is None:
            views = image_views(preprocessing.normalize(batch.image), tta)
        else:
            views = [jnp.asarray(batch.image)[:, i] for i in range(batch.image.shape[1])]
        logits = mean_logits(model, params, stats, views, first=first)
        return Metrics.of_batch(logits, batch.target, batch.mask, loss, metrics)

    def steps(
        params: Tree, stats: Tree, batches: Batch, count: jax.Array, *features: jax.Array
    ) -> Metrics:
        def one(_: None, batch: Batch, i: jax.Array) -> tuple[None, Metrics]:
            return None, step(params, stats, batch, *features)

        return one_by_one(one, None, batches, count)[1]

    return jax.jit(with_precision(step if steps_per_call == 1 else steps, precision))


def image_eval_step(recipe: Recipe, model: Model, sizes: BatchSizes, loss: LossChoice) -> Any:
    """Returns the step that evaluates a recipe's images, not their features.

    Args:
      recipe: the run's recipe.
      model: the network.
      sizes: sizes of the batches.
      loss: see `eval_step`.
    """
    return eval_step(
        model,
        recipe.preprocessing,
        tta=recipe.tta,
        steps_per_call=recipe.steps_per_execution,
        examples=sizes.examples,
        loss=loss,
        metrics=recipe.metrics,
        precision=recipe.matmul_precision,
    )
