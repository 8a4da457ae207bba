"""The one step of a stage whose head is solved: features, a sweep of penalties, the best of it."""

import time
from typing import NamedTuple

import jax
import numpy as np

from jaxft import processes
from jaxft.labels import Tree, paths
from jaxft.linear_probe import ITERATIONS, TOLERANCE, Fit, logistic_regression
from jaxft.train.feature_cache import Inputs
from jaxft.train.metrics import EpochMetrics, Metrics, Score
from jaxft.train.stage_program import Program
from jaxft.train.state import StageState
from jaxft.train.trainer import Run


def solve(run: Run, program: Program, inputs: Inputs, current: StageState) -> None:
    """Moves `current` by the stage's step, after which its head is that of the best penalty.

    Nothing is saved on the way: a run that ends in here does all of it again.

    Raises:
      InterruptedRunError: a signal asked it to stop.
      DataError: the network makes features that are not finite.
    """
    started = current.began = time.perf_counter()
    solver = program.plan.stage.solver
    assert solver is not None
    train = _Features(inputs.train(), run.splits.train.targets)
    rows = inputs.val()
    if rows is None:
        raise run.stopped()
    val = _Features(rows[:, 0], run.splits.val.targets)
    fits = logistic_regression(train.rows, train.target, program.model.num_classes, c=solver.c)
    trained = [_metrics(fit, train) for fit in fits]
    scores = [_metrics(fit, val).score for fit in fits]
    chosen = max(range(len(fits)), key=lambda i: _merit(fits[i], scores[i]))
    for i, fit in enumerate(fits):
        remark = f"{fit.iterations} iterations" + ", chosen" * (i == chosen)
        loss, accuracy = scores[i].loss, scores[i].accuracy
        run.console.epoch_row(
            f"C={np.format_float_scientific(fit.c, trim='-', exp_digits=1)}",
            trained[i].score.loss,
            loss,
            accuracy,
            None,
            remark,
        )
    if not fits[chosen].converged:
        run.console.say(
            f"After {ITERATIONS} iterations the chosen head's gradient has a norm of "
            f"{fits[chosen].gradient_norm:.0e}, not {TOLERANCE:.0e}: it is not quite the minimum."
        )
    # Each process has solved it, and they might differ in the last bit.
    head = processes.of_first(_head(fits[chosen], current.state.trainable))
    current.state = current.state._replace(trainable=run.devices.put(head))
    current.progress = current.progress.after_step()
    current.epoch_metrics = EpochMetrics(
        metrics=trained[chosen], steps=1, seconds=time.perf_counter() - started
    )


class _Features(NamedTuple):
    """Of all images of a half: what is before the head, [n d], and the classes, int32 [n]."""

    rows: np.ndarray
    target: np.ndarray


def _metrics(fit: Fit, of: _Features) -> Metrics:
    logits = np.asarray(of.rows, np.float64) @ fit.kernel + fit.bias
    mask = np.ones(len(logits), bool)
    return Metrics.total([Metrics.of_batch(jax.numpy.asarray(logits, np.float32), of.target, mask)])


def _merit(fit: Fit, score: Score) -> tuple[float, float, float]:
    """The more the better: accuracy, then loss, then the stronger penalty."""
    return score.accuracy, -score.loss, -fit.c


def _head(fit: Fit, like: Tree) -> Tree:
    """The fit in the place of the half that trains, which is the head."""
    named = {"kernel": fit.kernel, "bias": fit.bias}
    leaves = [
        named[path.rpartition(".")[2]].astype(leaf.dtype)
        for path, leaf in zip(paths(like), jax.tree.leaves(like), strict=True)
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)
