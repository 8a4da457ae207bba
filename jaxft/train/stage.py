"""The end of an epoch, in every kind of stage: validation, the metrics row and the checkpoint."""

import time
from collections.abc import Callable
from typing import Never

from jaxft.checkpoint.contents import Arrays, Snapshot
from jaxft.train.compiled_stage import CompiledStage
from jaxft.train.feature_cache import StageFeatures
from jaxft.train.nonfinite import check_validation
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import StageState, shown
from jaxft.train.trainer import Trainer


def end_epoch(
    trainer: Trainer,
    program: StageProgram,
    compiled: CompiledStage,
    features: StageFeatures,
    current: StageState,
    *,
    done: Callable[[], str],
) -> Snapshot | None:
    """Validates, writes the metrics row and saves a checkpoint.

    Args:
      trainer: the run's trainer.
      program, compiled: the stage.
      features: cached features of the stage.
      current: state of the stage, which moves to the end of the epoch.
      done: returns why the stage has no further epoch; empty if it has one.

    Returns:
      The arrays that the next stage starts from; None if the stage has not ended.

    Raises:
      InterruptedRunError: a signal asked the run to stop.
      NonFiniteError: the validation loss is not finite, and the recipe stops then.
    """
    plan, started = program.plan, time.perf_counter()
    validated = trainer.evaluate(*current.shown[:2], features)
    if validated is None:
        stop(trainer, program, current)
    current.validated = time.perf_counter()
    before, saved = current.progress, trainer.checkpoints.latest_step()
    check_validation(
        trainer,
        *current.shown[:2],
        validated,
        place=f"stage {plan.stage.name!r}, epoch {before.epoch + 1}, step {before.step}",
        remark=", though loss and gradients of all steps are finite"
        + (f". The last checkpoint is that of step {saved}" if saved else ""),
    )
    opt_state = plan.after_epoch(
        current.state.opt_state, loss=validated.loss, accuracy=validated.accuracy
    )
    current.state = current.state._replace(opt_state=trainer.devices.put(opt_state))
    current.tick()
    progress = current.progress.after_epoch(
        plan.stage, validated, done=done(), reductions=plan.reductions(opt_state)
    )
    current.progress = progress
    improved = progress.best_epoch == progress.epoch
    if improved:
        current.best = shown(compiled.copy(current.state), current.frozen)
    metrics = current.epoch_metrics
    row = metrics.row(
        plan.stage.name,
        epoch=progress.epoch,
        step=progress.step,
        validated=validated,
        seconds=metrics.seconds + time.perf_counter() - started,
    )
    skipped = f"{metrics.skipped} steps skipped" if metrics.skipped else ""
    trainer.console.epoch_row(
        progress.epoch,
        row["train_loss"],
        validated.loss,
        validated.accuracy,
        row["seconds"],
        ", ".join(filter(None, ("best" if improved else "", skipped))),
    )
    trainer.metrics.write(row)
    if not progress.ended:
        save(trainer, program, current)
        return None
    end = current.best if plan.stage.restore == "best" else current.shown
    current.tick()
    trainer.save(current.progress, metrics, Arrays(end).to_items(), keep=True)
    return end


def save(trainer: Trainer, program: StageProgram, current: StageState) -> None:
    """Starts to write a checkpoint within the stage."""
    current.tick()
    _save(trainer, program, current)


def _save(trainer: Trainer, program: StageProgram, current: StageState) -> None:
    trainer.save(current.progress, current.epoch_metrics, current.items(program))


def stop(trainer: Trainer, program: StageProgram, current: StageState) -> Never:
    """Saves a checkpoint, unless this step has one, and raises InterruptedRunError."""
    step = current.progress.step
    if trainer.checkpoints.latest_step() != step:
        save(trainer, program, current)
    raise trainer.interruption.error(
        f"came in stage {program.plan.stage.name!r}, and step {step} is saved. The same command "
        "resumes from there"
    )
