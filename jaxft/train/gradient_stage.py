"""Runs a stage of gradient steps: epochs of steps, each followed by validation and a checkpoint."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from itertools import chain, islice
from typing import Any

import jax
import numpy as np

from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Cached
from jaxft.data.batches import view_of_epoch
from jaxft.data.device_augment import augment_batch
from jaxft.data.process_source import ProcessSource
from jaxft.distributed import any_process
from jaxft.errors import DataError
from jaxft.report.nonfinite import step_error
from jaxft.stages import Stage
from jaxft.steps_per_execution import apart, sent
from jaxft.train.auto_rgn import BATCHES, restart_with_auto_rgn
from jaxft.train.compiled_stage import CompiledStage
from jaxft.train.metrics import EpochMetrics, StepRecord
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import StageState
from jaxft.train.trainer import Trainer
from jaxft.train.wise_finish import average_with_start


def run_gradient_stage(
    trainer: Trainer, program: StageProgram, compiled: CompiledStage, current: StageState
) -> Snapshot:
    """Trains a stage from its current state to its end.

    Args:
      trainer: the run's trainer.
      program, compiled: the stage.
      current: state of the stage, which moves along.

    Returns:
      The arrays that the next stage starts from.

    Raises:
      CheckpointError: the stage ends with `WiSE`, and the weights at its start cannot be read.
      InterruptedRunError: a signal asked the run to stop; a checkpoint is saved.
      NonFiniteError: a step or the validation loss is not finite, and the recipe stops then.
    """
    features, prefix = trainer.features(program, compiled, lambda: current.best), program.prefix

    def train_features(view: int) -> Any:
        with trainer.clock.measure("feature"):
            rows = features.train(view)
        if rows is None:
            raise trainer.stopped()
        return rows

    views = program.settings.num_views
    indices = np.arange(len(trainer.splits.train), dtype=np.int32)
    on_host = (lambda _: indices) if prefix.on_devices else lambda view: train_features(view)[:, 0]
    # The step donates its state, whose arrays are the candidate 0 for the best epoch.
    current.state = compiled.copy(current.state)
    batches = program.batches(
        trainer.splits.train,
        stop_epoch=program.epochs,
        first_epoch=current.progress.epoch,
        first_step=current.progress.position,
        features=on_host if prefix.train else None,
    )
    finish = None
    if program.plan.stage.finish:
        finish = partial(average_with_start, trainer, program, features, current)
    advised = False
    with closing(batches):
        while True:
            rest = [trainer.start if program.plan.stage.anchor else None]  # as it was compiled
            if prefix.train and prefix.on_devices:
                rest.append(train_features(view_of_epoch(current.progress.epoch, views)))
            _train_epoch(trainer, program, compiled, current, batches, rest)
            done = partial(_done, program, current)
            end = trainer.end_epoch(program, compiled, features, current, done=done, finish=finish)
            if not advised and (advice := _input_advice(trainer, current)):
                trainer.console.say(advice)
                advised = True  # once a stage: it does not get better
            if end:
                return end


def _train_epoch(
    trainer: Trainer,
    program: StageProgram,
    compiled: CompiledStage,
    current: StageState,
    batches: Iterator[Batch],
    rest: Sequence[Any],
) -> None:
    """Takes the remaining steps of the epoch, unless the stage's time is up before.

    `rest` are the last arguments of a step: start, and the features in device memory.
    """
    recipe, plan = program.recipe, program.plan
    steps_per_call, every = recipe.steps_per_execution, recipe.checkpoint_steps
    epoch, length = current.progress.epoch, program.epoch_length(current.progress.epoch)
    if current.progress.position == 0:
        batches = _begin_epoch(trainer, program, compiled, current, batches, rest)
    unseen: list[tuple[StepRecord, int]] = []  # each of that many steps
    idle, mark = 0.0, time.perf_counter()

    def look() -> None:
        nonlocal idle, mark
        fetched = jax.device_get([record for record, _ in unseen])
        counts = [count for _, count in unseen]
        pairs = zip(fetched, counts, strict=True)
        records = [record for pair in pairs for record in apart(*pair, steps_per_call)]
        _check_finite(trainer, program, current, records)
        now = time.perf_counter()
        current.epoch_metrics = current.epoch_metrics.plus(records, seconds=now - mark, idle=idle)
        idle, mark = 0.0, now
        unseen.clear()

    with trainer.console.epoch(epoch + 1, length, current.progress.position) as bar:
        while current.progress.position < length:
            asked = time.perf_counter()
            to_save = every - current.progress.step % every if every else steps_per_call
            same_shape = program.steps_of_one_shape(epoch, current.progress.position)
            try:
                taken = list(islice(batches, min(steps_per_call, to_save, same_shape)))
            except DataError as error:
                look()
                raise _saved_before(error, trainer, program, current) from error
            # While the step before is at work, nobody waits; and this batch travels meanwhile.
            if not unseen or unseen[-1][0].finite.is_ready():  # type: ignore[attr-defined]
                idle += time.perf_counter() - asked
            batch, *count = sent(trainer.devices, taken, steps_per_call)
            batch = augment_batch(batch, program.settings.augment)
            number = np.int32(current.progress.step)
            current.state, record = compiled.step(
                current.state, current.frozen, batch, *count, number, *rest
            )
            current.began = current.began or time.perf_counter()
            for _ in taken:
                current.progress = current.progress.after_step()
            unseen.append((record, len(taken)))
            jax.block_until_ready(unseen[-2:-1])  # limits the batches queued on the device

            last = current.progress.position == length
            synced = last or sum(count for _, count in unseen) >= recipe.sync_steps
            if synced:
                look()
            bar.advance(current.epoch_metrics.metrics.score.loss, len(taken))
            if last:
                return  # validation asks at once whether it is to stop
            if synced or jax.process_count() == 1:
                if trainer.stop_asked():
                    look()
                    trainer.stop(program, current)
                if plan.stage.max_minutes and any_process(_time_is_up(plan.stage, current)):
                    look()
                    return
            if every and current.progress.step % every == 0:
                look()
                trainer.save_within(program, current)


def _saved_before(
    error: DataError, trainer: Trainer, program: StageProgram, current: StageState
) -> DataError:
    """Saves a checkpoint before the error of an image ends the run; returns the error to raise.

    Saves nothing on several processes, since a save needs all of them and the others have not met
    the error; nor before the first step, so that the corrected recipe can use the folder.
    """
    if jax.process_count() > 1 or not current.progress.step:
        return error
    step = trainer.save_step(program, current)
    return DataError(
        f"{error}\nStep {step} is saved: with the same images, the same command resumes there."
    )


def _begin_epoch(
    trainer: Trainer,
    program: StageProgram,
    compiled: CompiledStage,
    current: StageState,
    batches: Iterator[Batch],
    rest: Sequence[Any],
) -> Iterator[Batch]:
    """Sets relative learning rates, empties the epoch's metrics and returns the epoch's batches."""
    plan, epoch = program.plan, current.progress.epoch
    if compiled.gradient_norms:
        first = list(islice(batches, min(BATCHES, program.epoch_length(epoch))))
        current.state = restart_with_auto_rgn(
            compiled,
            trainer.devices,
            current.state,
            current.frozen,
            [
                augment_batch(trainer.devices.batch(each), program.settings.augment)
                for each in first
            ],
            step=current.progress.step,
            rest=rest,
        )
        batches = chain(first, batches)
    opt_state, per_epoch = current.state.opt_state, program.steps_per_epoch
    lr = plan.lr_at(opt_state, steps_per_epoch=per_epoch)
    current.epoch_metrics = EpochMetrics(lr=lr)
    return batches


def _check_finite(
    trainer: Trainer, program: StageProgram, current: StageState, records: Sequence[StepRecord]
) -> None:
    """Raises NonFiniteError for the first of the last steps that is not finite."""
    if program.recipe.on_nonfinite == "skip":
        return
    for step, record in enumerate(records, current.progress.step - len(records) + 1):
        if not record.finite:
            saved = trainer.checkpoints.latest_step()
            raise step_error(program.plan.stage.name, current, record, step=step, saved=saved)


def _done(program: StageProgram, current: StageState) -> str:
    """Returns why there is no further epoch, if there is none."""
    stage, progress = program.plan.stage, current.progress
    steps = progress.epoch * program.steps_per_epoch + progress.position
    if steps >= program.steps and steps == stage.steps:
        return f"{steps} of {steps} steps done"
    if steps >= program.steps:
        return f"{program.epochs} of {program.epochs} epochs done"
    if stage.max_minutes and any_process(_time_is_up(stage, current)):
        return f"its {stage.max_minutes:g} minutes are over"
    return ""


def _time_is_up(stage: Stage, current: StageState) -> bool:
    current.tick()
    return stage.max_minutes is not None and current.progress.seconds >= 60 * stage.max_minutes


def _input_advice(trainer: Trainer, current: StageState) -> str | None:
    train = trainer.splits.train
    return current.epoch_metrics.input_advice(
        current.progress.epoch,
        threads=trainer.recipe.workers,
        processes=trainer.recipe.worker_processes,
        cores=os.cpu_count() or 1,
        cached=not isinstance(train, Cached | ProcessSource) or train.complete,
    )
