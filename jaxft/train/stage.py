"""One stage: epochs of steps, each followed by validation and a checkpoint."""

import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft import data
from jaxft.checkpoint import Checkpoints
from jaxft.data import Batch, Cached, Splits
from jaxft.data.balance import class_weights
from jaxft.groups import StagePlan
from jaxft.labels import Tree, combine, partition
from jaxft.models import Model
from jaxft.recipe import Recipe
from jaxft.report.console import Console
from jaxft.report.metrics import MetricsLog
from jaxft.train.evaluate import Score, score
from jaxft.train.norms import norm_modes
from jaxft.train.objective import Objective
from jaxft.train.progress import Progress
from jaxft.train.step import Tally, TrainState, train_step
from jaxft.train.waiting import Waiting


class Snapshot(NamedTuple):
    """All arrays of a run at one moment: full parameters, statistics, optimizer state."""

    params: Tree
    stats: Tree
    opt_state: optax.OptState


@dataclass(frozen=True)
class Run:
    """What stays the same from the first stage to the last."""

    recipe: Recipe
    model: Model
    splits: Splits
    plans: tuple[StagePlan, ...]
    eval_step: Callable[[Tree, Tree, Batch], Tally]
    checkpoints: Checkpoints
    metrics: MetricsLog
    console: Console

    @property
    def data(self) -> dict[str, object]:
        """What of the images a run depends on and a recipe does not say."""
        train, val = self.splits
        return {"train": len(train), "val": len(val), "classes": list(train.classes)}

    @property
    def steps_per_epoch(self) -> int:
        """Batches that hold every training image once, but for what `drop_last` drops."""
        recipe = self.recipe
        return data.steps_per_epoch(
            self.splits.train, recipe.batch_size, drop_last=recipe.drop_last
        )

    @property
    def objective(self) -> Objective:
        """What the steps of all stages minimise."""
        recipe = self.recipe
        weighted = recipe.balance == "loss"
        return Objective(
            label_smoothing=recipe.label_smoothing,
            class_weights=class_weights(self.splits.train) if weighted else None,
            erasing=recipe.erasing,
            mixup=recipe.mixup,
            cutmix=recipe.cutmix,
        )

    def transform(self, stage: int) -> optax.GradientTransformationExtraArgs:
        """The optimizer of a stage."""
        plan, optimizer = self.plans[stage], self.recipe.optimizer
        return plan.transform(optimizer, steps_per_epoch=self.steps_per_epoch)

    def evaluate(self, params: Tree, stats: Tree) -> Score:
        """The score on the validation images, each counted once."""
        batches = data.eval_batches(
            self.splits.val,
            self.recipe.preprocessing,
            batch_size=self.recipe.batch_size,
            workers=self.recipe.workers,
        )
        tallies: list[Tally] = []
        with closing(batches):
            for batch in batches:
                tallies.append(self.eval_step(params, stats, batch))
                jax.block_until_ready(tallies[-2:-1])  # as in training
        return score(tallies)


def train_stage(
    run: Run, progress: Progress, current: Snapshot, best: Snapshot
) -> tuple[Progress, Snapshot]:
    """Trains from `progress` to the stage's end; returns its last progress and what it hands on.

    `current` and `best` are the arrays at `progress` and at the stage's best epoch so far.
    """
    plan, recipe = run.plans[progress.stage], run.recipe
    norms = norm_modes(current.params, current.stats, plan.labels)
    transform, steps = run.transform(progress.stage), run.steps_per_epoch
    step = train_step(run.model, transform, recipe.preprocessing, norms, run.objective)

    title = (
        f"Stage {progress.stage + 1} of {len(run.plans)}: {plan.stage.name}, "
        f"{'at most ' if plan.stage.until else ''}{plan.stage.epochs} epochs of {steps} steps"
    )
    run.console.stage(plan, title, current.params, norms)
    if progress.epoch == 0:
        run.console.epoch_row(0, None, progress.score.loss, progress.score.accuracy, None)

    trainable, frozen = partition(current.params, plan.labels)
    # The step donates its state, so what must outlive it is copied out of it.
    state = _copy(TrainState(trainable, current.stats, current.opt_state))
    batches = data.train_batches(
        run.splits.train,
        recipe.preprocessing,
        augment=recipe.augment,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        stage=progress.stage,
        first_epoch=progress.epoch,
        epochs=plan.stage.epochs,
        workers=recipe.workers,
        drop_last=recipe.drop_last,
        balanced=recipe.balance == "sampling",
    )
    advised = False
    with closing(batches):
        while not progress.ended:
            started = time.perf_counter()
            rates = plan.rates_at(state.opt_state, steps_per_epoch=steps)
            state, trained, waiting = _train_epoch(
                run, progress, step, state, frozen, batches, steps
            )
            validated = run.evaluate(combine(state.trainable, frozen), state.stats)
            opt_state = plan.after_epoch(state.opt_state, **dataclasses.asdict(validated))
            state = state._replace(opt_state=opt_state)
            current = Snapshot(combine(state.trainable, frozen), state.stats, state.opt_state)
            progress = progress.after_epoch(plan.stage, steps, validated)
            improved = progress.best_epoch == progress.epoch
            if improved:
                best = Snapshot(combine(_copy(state.trainable), frozen), *_copy(state[1:]))
            _record(run, progress, trained, rates, time.perf_counter() - started, improved)
            if not advised and (advice := _advice(run, waiting, progress.epoch)):
                run.console.say(advice)
                advised = True  # once a stage: it does not get better
            if progress.ended and plan.stage.hand_on == "best":
                current = best
            _save(run, progress, current, best)
    run.console.row("")
    run.console.say(_epilogue(plan, progress))
    return progress, current


def _train_epoch(
    run: Run,
    progress: Progress,
    step: Callable[[TrainState, Tree, Batch, jax.Array], tuple[TrainState, Tally]],
    state: TrainState,
    frozen: Tree,
    batches: Iterator[Batch],
    steps: int,
) -> tuple[TrainState, Score, Waiting]:
    tallies: list[Tally] = []
    key = jax.random.key(run.recipe.seed)
    idle, started = 0.0, time.perf_counter()
    with run.console.epoch(progress.epoch + 1, steps) as bar:
        for i in range(steps):
            asked = time.perf_counter()
            batch = next(batches)
            # While the step before is at work, nobody waits; and this batch travels meanwhile.
            if tallies and tallies[-1].loss.is_ready():  # type: ignore[attr-defined]
                idle += time.perf_counter() - asked
            batch = jax.device_put(batch)
            state, sums = step(state, frozen, batch, jax.random.fold_in(key, progress.step + i))
            tallies.append(sums)
            if i == 0:
                started = time.perf_counter()  # not before: it has compiled
            before = jax.block_until_ready(tallies[-2:-1])  # or the host fills the device ahead
            bar.advance(score(before).loss if before and bar.shown else float("nan"))
    trained = score(tallies)
    return state, trained, Waiting(time.perf_counter() - started, idle)


def _advice(run: Run, waiting: Waiting, epoch: int) -> str | None:
    train = run.splits.train
    cached = not isinstance(train, Cached) or train.complete
    cores = os.cpu_count() or 1
    return waiting.advice(epoch, workers=run.recipe.workers, cores=cores, cached=cached)


def _record(
    run: Run,
    progress: Progress,
    trained: Score,
    rates: dict[str, float],
    seconds: float,
    improved: bool,
) -> None:
    plan = run.plans[progress.stage]
    run.console.epoch_row(
        progress.epoch,
        trained.loss,
        progress.score.loss,
        progress.score.accuracy,
        seconds,
        "best" if improved else "",
    )
    run.metrics.write(
        {
            "stage": plan.stage.name,
            "epoch": progress.epoch,
            "step": progress.step,
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "val_loss": progress.score.loss,
            "val_accuracy": progress.score.accuracy,
            "rates": rates,  # of the epoch's first step
            "seconds": seconds,
        }
    )


def _save(run: Run, progress: Progress, current: Snapshot, best: Snapshot) -> None:
    arrays = current._asdict()
    if not progress.ended:  # what an ended stage hands on is all that matters of it
        arrays["best"] = best._asdict()
    header = {**dataclasses.asdict(progress), "data": run.data}
    run.checkpoints.save(progress.step, header, arrays)


def _epilogue(plan: StagePlan, progress: Progress) -> str:
    sentence = f"Stage {plan.stage.name!r} ended: {progress.ended}. "
    if plan.stage.hand_on == "last":
        return sentence + f"Its last epoch goes on (accuracy {progress.score.accuracy:.4f})."
    accuracy = f"accuracy {progress.best.accuracy:.4f}"
    if progress.best_epoch == 0:
        return sentence + f"No epoch improved on its start, which goes on ({accuracy})."
    return sentence + f"Epoch {progress.best_epoch} was its best and goes on ({accuracy})."


def _copy(tree: Tree) -> Tree:
    return jax.tree.map(jnp.copy, tree)
