"""Ends a stage with the best average of its start and its end, see `jaxft.WiSE`."""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import jax
import numpy as np

from jaxft.batch_sizes import batch_sizes
from jaxft.checkpoint import weights_only
from jaxft.checkpoint.contents import Header, Snapshot
from jaxft.data import Batch
from jaxft.early_stopping import is_better
from jaxft.errors import CheckpointError
from jaxft.labels import Tree, combine, partition
from jaxft.train.feature_cache import StageFeatures
from jaxft.train.metrics import Score
from jaxft.train.norm_statistics import statistics_step
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import Averaged, Progress, StageState, with_stage_merge
from jaxft.train.trainer import Trainer
from jaxft.weight_averaging import interpolate


def average_with_start(
    trainer: Trainer,
    program: StageProgram,
    features: StageFeatures,
    current: StageState,
    end: Snapshot,
    score: Score,
) -> Averaged:
    """Validates the averages of a stage's start and end, prints them and returns the best.

    Args:
      trainer: the run's trainer.
      program: the stage, whose `finish` is set.
      features: cached features of the stage.
      current: state before the last validation; a run that is stopped here resumes from it.
      end: arrays at the end of the stage.
      score: validation score of `end`.

    Raises:
      CheckpointError: the weights at the stage's start cannot be read.
      InterruptedRunError: a signal asked the run to stop.
    """
    stage = program.plan.stage
    assert stage.finish
    # Saves now, so that a restart repeats no step, and the checkpoint of the start is complete.
    trainer.save_step(program, current)
    before = trainer.devices.put(_start_weights(trainer, program))
    start = with_stage_merge(program, Snapshot(*before, end.opt_state))
    start_trained, _ = partition(start.params, program.plan.labels)
    end_trained, frozen = partition(end.params, program.plan.labels)
    reestimate = _reestimation(trainer, program)

    def average(alpha: float) -> Snapshot | None:
        if alpha in (0, 1):
            return end if alpha else start
        params = combine(interpolate(start_trained, end_trained, alpha), frozen)
        params = trainer.devices.put(params)
        stats = reestimate(params, end.stats)
        return None if stats is None else end._replace(params=params, stats=stats)

    scores: dict[float, Score] = {}
    best, chosen = end, 1.0
    for alpha in sorted(stage.finish.alphas, reverse=True):
        began = time.perf_counter()
        with trainer.clock.measure("validation"):
            arrays = average(alpha)
            validated = score if alpha == 1 else None
            if arrays is not None and validated is None:
                validated = trainer.evaluate(program, arrays.params, arrays.stats, features)
        if arrays is None or validated is None:
            trainer.stop(program, current)
        scores[alpha] = validated
        improved = len(scores) == 1 or is_better(validated, scores[chosen], *stage.best_by)
        if improved:
            best, chosen = arrays, alpha
        seconds = time.perf_counter() - began
        trainer.console.epoch_row(f"a={alpha:g}", None, validated, seconds, "best" * improved)
    current.validated = time.perf_counter()
    return Averaged(best, scores[chosen], _curve(scores, chosen))


def _curve(scores: Mapping[float, Score], chosen: float) -> dict[str, Any]:
    """Returns the chosen alpha, and each metric by alpha, with the smallest alpha first."""
    curve: dict[str, Any] = {"alpha": chosen}
    for alpha in sorted(scores):
        for name, value in scores[alpha].values.items():
            curve.setdefault(f"val_{name}", {})[str(alpha)] = value
    return curve


def _start_weights(trainer: Trainer, program: StageProgram) -> tuple[Tree, Tree]:
    """Reads parameters and statistics at the start of a stage.

    They are the start of the run, or the end of the stage before.

    Raises:
      CheckpointError: they are missing or damaged.
    """
    checkpoints = trainer.checkpoints
    if program.index == 0:
        return weights_only.read_weights(checkpoints.folder.parent / "start")
    for step in reversed(checkpoints.steps()):
        with suppress(CheckpointError):  # of another checkpoint
            progress = Progress.from_fields(Header.from_json(checkpoints.header(step)).progress)
            if progress.ended and progress.stage == program.index - 1:
                break
    else:
        before = trainer.recipe.stages[program.index - 1].name
        raise CheckpointError(
            f"{checkpoints.folder} has no checkpoint of the end of stage {before!r}, with which "
            f"stage {program.plan.stage.name!r} is to be averaged. Restore it from a copy."
        )
    return weights_only.read_weights(checkpoints.path(step))


def _reestimation(trainer: Trainer, program: StageProgram) -> Callable[[Tree, Tree], Tree | None]:
    """Returns `(params, stats) -> stats`, the statistics of these weights on training images.

    Only layers whose statistics the stage updates change. The result is None if a signal came.
    """
    train, size = trainer.splits.train, program.settings.batch_size
    layers = {name for name, mode in program.norms.items() if mode == "batch"}
    if not layers:
        return lambda params, stats: stats
    sizes = batch_sizes(program.model, trainer.devices, len(train), size)
    recipe = trainer.recipe
    step = statistics_step(
        program.model, recipe.preprocessing, trainer.devices, layers,
        examples=sizes.examples, precision=recipe.matmul_precision,
    )  # fmt: skip

    def reestimate(params: Tree, stats: Tree) -> Tree | None:
        number = 0

        def add(batch: Batch) -> jax.Array:
            nonlocal stats, number
            number += 1
            stats = step(params, stats, batch, np.int32(number))
            leaf: jax.Array = jax.tree.leaves(stats)[0]
            return leaf  # the caller waits for it

        done = trainer.of_each_batch(train, add, batch_size=size, title="Norm statistics")
        return None if done is None else stats

    return reestimate
