"""Steps and validation losses that are not finite: errors that name the part and the way out."""

import math
from collections.abc import Callable
from itertools import compress

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data import Batch, Preprocessing
from jaxft.errors import NonFiniteError
from jaxft.labels import Tree, paths
from jaxft.models import Model
from jaxft.models.norm_modes import layer
from jaxft.train.feature_cache import finite_rows
from jaxft.train.metrics import Score, StepRecord
from jaxft.train.state import StageState


def step_error(
    stage: str, current: StageState, record: StepRecord, *, step: int, saved: int | None
) -> NonFiniteError:
    """Returns the error of a step that is not finite.

    Args:
      stage: name of the stage.
      current: state of the stage after the step.
      record: record of the step.
      step: number of the step.
      saved: step of the last checkpoint, if there is one.
    """
    return NonFiniteError(
        f"stage {stage!r}, epoch {current.progress.epoch + 1}, step {step}: "
        + _not_finite(current, record)
        + (f"The checkpoint of step {saved} is good. " if saved else "")
        + "With --on-nonfinite skip the same command resumes and leaves such steps out. "
        + _way_out(record, step)
    )


def _not_finite(current: StageState, record: StepRecord) -> str:
    """Returns a sentence on the part of a step that is not finite."""
    examples = int(record.metrics.examples)
    mean = float(record.metrics.loss) / examples
    if record.weight == 0:
        return (
            f"all {examples} images of the batch are of classes whose class_weights are 0, and a "
            "mean over a weight of 0 is NaN. "
        )
    if not math.isfinite(mean):
        return f"the loss is {mean}. "
    groups = [name for name, norm in record.gradient_norms.items() if not math.isfinite(norm)]
    if groups:
        return f"the loss is {mean:.4g}, but gradients of {', '.join(groups)} are not finite. "
    stats = current.state.stats
    leaves = zip(paths(stats), jax.tree.leaves(stats), strict=True)
    wrong = dict.fromkeys(layer(path) for path, x in leaves if not np.isfinite(x).all())
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        return (
            f"the loss is {mean:.4g}, but running statistics of {', '.join([*wrong][:5])}{more} "
            "are not finite. "
        )
    return "the loss and gradients are finite, but the optimizer's update is not. "


def _way_out(record: StepRecord, step: int) -> str:
    if record.weight == 0:
        return "Or use reduction='sum', a larger batch_size, or leave images of these classes out."
    if step == 1:  # no update has been made yet
        return "It is the run's first step: look at the images, the weights and the network."
    return (
        "If the loss had been rising, lower learning rates or a clip_norm make another recipe, for "
        "another --workdir; --fork-from takes over the stages that went well."
    )


def validation_error(score: Score, *, place: str, remark: str, block: str | None) -> NonFiniteError:
    """Returns the error of a validation loss that is not finite.

    Args:
      score: the validation score.
      place: place in the run, such as "epoch 1".
      remark: clause on the place.
      block: the first block whose output is not finite, if known.
    """
    return NonFiniteError(
        f"{place}: the validation loss is {score.loss}{remark}. "
        + (f"The first block whose output is not finite is {block!r}. " if block else "")
        + "Look at the images to validate, at the weights (large ones overflow) and at the running "
        "statistics (norms). With --on-nonfinite skip the same command resumes, and such an epoch "
        "is never the best."
    )


def first_block(
    model: Model,
    preprocessing: Preprocessing,
    params: Tree,
    stats: Tree,
    each_batch: Callable[[Callable[[Batch], jax.Array]], list[jax.Array] | None],
) -> str | None:
    """Returns the first block whose output is not finite for some image.

    None if there is no such block, if the network is one block, or if a signal has come.

    Args:
      model: the network.
      preprocessing: normalises the images.
      params, stats: the weights.
      each_batch: calls a function with each batch of the images; returns the results.
    """
    if len(model.blocks) == 1:
        return None

    @jax.jit
    def wrong(params: Tree, stats: Tree, batch: Batch) -> jax.Array:
        x, flags = preprocessing.normalize(batch.image), []
        for block in model.blocks:
            x, _ = model.apply(params, stats, x, norms="running", first=block, last=block)
            flags.append(~finite_rows(x).all(where=jnp.asarray(batch.mask)))
        return jnp.stack(flags)

    flags = each_batch(lambda batch: wrong(params, stats, batch))
    return next(compress(model.blocks, np.any(jax.device_get(flags or []), axis=0)), None)
