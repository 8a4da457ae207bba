"""Validation losses that are not finite: the run ends, and the message names the block."""

import math
from itertools import compress

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data import Batch
from jaxft.errors import NonFiniteError
from jaxft.labels import Tree
from jaxft.train.feature_cache import finite_rows
from jaxft.train.metrics import Score
from jaxft.train.trainer import Run


def check_validation(
    run: Run, params: Tree, stats: Tree, score: Score, *, place: str, remark: str = ""
) -> None:
    """Checks the validation loss of these weights, at a place such as "epoch 1".

    Raises:
      NonFiniteError: it is NaN or infinite, and the recipe does not skip what is not finite.
    """
    if math.isfinite(score.loss) or run.recipe.on_nonfinite == "skip":
        return
    block = _first_block(run, params, stats)
    raise NonFiniteError(
        f"{place}: the validation loss is {score.loss}{remark}. "
        + (f"The first block whose output is not finite is {block!r}. " if block else "")
        + "Look at the images to validate, at the weights (large ones overflow) and at the running "
        "statistics (norms). With --on-nonfinite skip the same command goes on, and such an epoch "
        "is never the best."
    )


def _first_block(run: Run, params: Tree, stats: Tree) -> str | None:
    """Returns the first block whose output is not finite for any image to validate.

    None if there is no such block, if the network is one block, or if a signal has come.
    """
    model, preprocessing = run.programs[0].model, run.recipe.preprocessing
    if len(model.blocks) == 1:
        return None

    @jax.jit
    def wrong(params: Tree, stats: Tree, batch: Batch) -> jax.Array:
        x, found = preprocessing.normalize(batch.image), []
        for block in model.blocks:
            x, _ = model.apply(params, stats, x, norms="running", first=block, last=block)
            found.append(~finite_rows(x).all(where=jnp.asarray(batch.mask)))
        return jnp.stack(found)

    flags = run.of_each_batch(run.splits.val, lambda batch: wrong(params, stats, batch))
    return next(compress(model.blocks, np.any(jax.device_get(flags or []), axis=0)), None)
