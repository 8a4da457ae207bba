"""Runs a linear-probe stage: features, a sweep of penalties, and the head with the best of them."""

import time
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.checkpoint.contents import Snapshot
from jaxft.distributed import broadcast_from_main
from jaxft.labels import Tree, paths
from jaxft.linear_probe import ITERATIONS, TOLERANCE, Fit, logistic_regression
from jaxft.train.compiled_stage import CompiledStage
from jaxft.train.feature_cache import StageFeatures
from jaxft.train.metrics import EpochMetrics, Metrics, Score
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import StageState
from jaxft.train.trainer import Trainer


def run_linear_probe_stage(
    trainer: Trainer, program: StageProgram, compiled: CompiledStage, current: StageState
) -> Snapshot:
    """Solves the head of a stage; the stage counts as one step of one epoch.

    Args:
      trainer: the run's trainer.
      program, compiled: the stage.
      current: state of the stage, which moves along.

    Returns:
      The arrays that the next stage starts from.

    Raises:
      InterruptedRunError: a signal asked the run to stop.
      NonFiniteError: the network's features are not finite.
    """
    features = trainer.features(program, compiled, lambda: current.best)
    if current.progress.position == 0:  # otherwise only the validation is missing
        _solve(trainer, program, features, current)
    end = trainer.end_epoch(program, compiled, features, current, done=lambda: "it is solved")
    assert end is not None
    return end


def _solve(
    trainer: Trainer, program: StageProgram, features: StageFeatures, current: StageState
) -> None:
    """Takes the stage's step, which replaces the head by the fit with the best penalty.

    Nothing is saved before its end: a run that is stopped here starts the step again.
    """
    started = current.began = time.perf_counter()
    probe = program.plan.stage.linear_probe
    assert probe is not None
    with trainer.clock.measure("feature"):
        train_rows = features.train()
        val_rows = None if train_rows is None else features.val()
    computed = time.perf_counter()
    if train_rows is None or val_rows is None:
        raise trainer.stopped()
    prefix = program.prefix
    assert prefix.row
    storage = prefix.storage(trainer.devices, trainer.recipe)
    to_host = partial(storage.to_host, row=prefix.row.shape)
    train, val = (
        _Features(to_host(rows, len(split))[:, 0], split.targets)  # without mirror images
        for rows, split in zip((train_rows, val_rows), trainer.splits, strict=True)
    )
    fits = logistic_regression(train.rows, train.target, program.model.num_classes, c=probe.c)
    metrics = trainer.recipe.metrics
    trained = [_metrics(fit, train, metrics) for fit in fits]
    scores = [_metrics(fit, val, metrics).score for fit in fits]
    chosen = max(range(len(fits)), key=lambda i: _merit(fits[i], scores[i]))
    for i, fit in enumerate(fits):
        remark = f"{fit.iterations} iterations" + ", chosen" * (i == chosen)
        trainer.console.epoch_row(
            f"C={np.format_float_scientific(fit.c, trim='-', exp_digits=1)}",
            trained[i].score.loss,
            scores[i],
            None,
            remark,
        )
    if not fits[chosen].converged:
        trainer.console.say(
            f"After {ITERATIONS} iterations the chosen head's gradient has a norm of "
            f"{fits[chosen].gradient_norm:.0e}, not {TOLERANCE:.0e}: it is not quite the minimum."
        )
    # Each process has solved it, and they might differ in the last bit.
    head = broadcast_from_main(_head(fits[chosen], current.state.trainable))
    current.state = current.state._replace(trainable=trainer.devices.put(head))
    current.progress = current.progress.after_step()
    current.epoch_metrics = EpochMetrics(
        metrics=trained[chosen],
        steps=1,
        seconds=time.perf_counter() - started,
        idle=computed - started,
    )


class _Features(NamedTuple):
    """Inputs of the head `[n d]` and classes int32 `[n]` of all images of a split."""

    rows: np.ndarray
    target: np.ndarray


def _metrics(fit: Fit, features: _Features, metrics: Sequence[str]) -> Metrics:
    logits = np.asarray(features.rows, np.float64) @ fit.kernel + fit.bias
    batch = jnp.asarray(logits, np.float32), features.target, np.ones(len(logits), bool)
    return Metrics.total([Metrics.of_batch(*batch, metrics=metrics)])


def _merit(fit: Fit, score: Score) -> tuple[float, float, float]:
    """Returns a key to sort by: higher accuracy, then lower loss, then the stronger penalty."""
    return score.accuracy, -score.loss, -fit.c


def _head(fit: Fit, like: Tree) -> Tree:
    """Returns the fit in the structure of the trainable half, which is the head."""
    named = {"kernel": fit.kernel, "bias": fit.bias}
    leaves = [
        named[path.rpartition(".")[2]].astype(leaf.dtype)
        for path, leaf in zip(paths(like), jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
