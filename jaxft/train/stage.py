"""One stage: epochs of steps, each followed by validation and a checkpoint."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import closing
from itertools import chain, islice
from typing import Never

import jax
import numpy as np

from jaxft.checkpoint.contents import Arrays, Snapshot
from jaxft.data import Batch, Cached
from jaxft.errors import NonFiniteError
from jaxft.labels import paths
from jaxft.processes import agree
from jaxft.stages import Stage
from jaxft.train.auto_rgn import BATCHES, set_out
from jaxft.train.execution import apart, sent
from jaxft.train.feature_cache import Inputs
from jaxft.train.linear_probe_stage import solve
from jaxft.train.metrics import EpochMetrics, Score, StepRecord
from jaxft.train.nonfinite import check_validation
from jaxft.train.norms import layer
from jaxft.train.stage_program import Compiled, Program
from jaxft.train.state import StageState, shown
from jaxft.train.trainer import Run
from jaxft.train.waiting import Waiting


def train_stage(run: Run, program: Program, compiled: Compiled, current: StageState) -> Snapshot:
    """Trains from `current`, which moves along, to the stage's end; returns what it hands on.

    Raises:
      InterruptedRunError: a signal asked it to stop; it has saved where it was.
      NonFiniteError: what a step makes or the validation loss is not finite, and the recipe has
        it stop.
    """
    start = current.progress
    inputs = Inputs(run, program, compiled, lambda: current.best)
    if program.plan.stage.solver:
        if start.position == 0:  # else only its validation is missing
            solve(run, program, inputs, current)
        handed_on = _end_epoch(run, program, compiled, inputs, current)
        assert handed_on is not None
        return handed_on
    # The step donates its state, and what it comes from is the stage's candidate 0.
    current.state = compiled.copy(current.state)
    batches = program.batches(
        run.splits.train,
        epochs=program.epochs,
        first_epoch=start.epoch,
        first_step=start.position,
        kept=inputs.train if program.prefix.train else None,
    )
    advised = False
    with closing(batches):
        while True:
            _train_epoch(run, program, compiled, current, batches)
            handed_on = _end_epoch(run, program, compiled, inputs, current)
            if not advised and (advice := _advice(run, current)):
                run.console.say(advice)
                advised = True  # once a stage: it does not get better
            if handed_on:
                return handed_on


def _train_epoch(
    run: Run, program: Program, compiled: Compiled, current: StageState, batches: Iterator[Batch]
) -> None:
    """Takes the steps that the epoch has left, unless its stage's time is up before."""
    recipe, plan = program.recipe, program.plan
    places, every = recipe.steps_per_execution, recipe.checkpoint_steps
    epoch, length = current.progress.epoch, program.epoch_length(current.progress.epoch)
    anchor = run.start if plan.stage.anchor else None  # as the step was compiled
    if current.progress.position == 0:
        if compiled.gauge:
            first = list(islice(batches, min(BATCHES, length)))
            current.state = set_out(
                compiled,
                run.devices,
                current.state,
                current.frozen,
                map(run.devices.batch, first),
                step=current.progress.step,
                start=anchor,
            )
            batches = chain(first, batches)
        state, per_epoch = current.state.opt_state, program.steps_per_epoch
        current.epoch_metrics = EpochMetrics(rates=plan.rates_at(state, steps_per_epoch=per_epoch))
    unseen: list[tuple[StepRecord, int]] = []  # of so many steps each
    idle, mark = 0.0, time.perf_counter()

    def look() -> None:
        nonlocal idle, mark
        fetched = jax.device_get([record for record, _ in unseen])
        counts = [count for _, count in unseen]
        records = [
            own for each in zip(fetched, counts, strict=True) for own in apart(*each, places)
        ]
        _check_finite(run, program, current, records)
        now = time.perf_counter()
        current.epoch_metrics = current.epoch_metrics.plus(records, seconds=now - mark, idle=idle)
        idle, mark = 0.0, now
        unseen.clear()

    with run.console.epoch(epoch + 1, length, current.progress.position) as bar:
        while current.progress.position < length:
            asked = time.perf_counter()
            to_save = every - current.progress.step % every if every else places
            ahead = min(places, to_save, program.alike(epoch, current.progress.position))
            taken = list(islice(batches, ahead))
            # While the step before is at work, nobody waits; and this batch travels meanwhile.
            if not unseen or unseen[-1][0].finite.is_ready():  # type: ignore[attr-defined]
                idle += time.perf_counter() - asked
            sending = sent(run.devices, taken, places)
            number = np.int32(current.progress.step)
            current.state, record = compiled.step(
                current.state, current.frozen, *sending, number, anchor
            )
            current.began = current.began or time.perf_counter()
            for _ in taken:
                current.progress = current.progress.after_step()
            unseen.append((record, len(taken)))
            jax.block_until_ready(unseen[-2:-1])  # or the host fills the device ahead

            last = current.progress.position == length
            synced = last or sum(count for _, count in unseen) >= recipe.sync_steps
            if synced:
                look()
            bar.advance(current.epoch_metrics.metrics.score.loss, len(taken))
            if last:
                return  # validation asks at once whether it is to stop
            if synced or jax.process_count() == 1:
                if run.stop_asked():
                    look()
                    _stop(run, program, current)
                if plan.stage.minutes and agree(_time_is_up(plan.stage, current)):
                    look()
                    return
            if every and current.progress.step % every == 0:
                look()
                _save(run, program, current)


def _end_epoch(
    run: Run, program: Program, compiled: Compiled, inputs: Inputs, current: StageState
) -> Snapshot | None:
    """Validates, records and saves; returns what the stage hands on, if that was its end."""
    plan, started = program.plan, time.perf_counter()
    validated = run.evaluate(*current.shown[:2], inputs)
    if validated is None:
        _stop(run, program, current)
    current.validated = time.perf_counter()
    _check_score(run, program, current, validated)
    opt_state = plan.after_epoch(
        current.state.opt_state, loss=validated.loss, accuracy=validated.accuracy
    )
    current.state = current.state._replace(opt_state=run.devices.put(opt_state))
    current.tick()
    progress = current.progress.after_epoch(
        plan.stage,
        validated,
        done=_done(program, current),
        reductions=plan.reductions(opt_state),
    )
    current.progress = progress
    improved = progress.best_epoch == progress.epoch
    if improved:
        current.best = shown(compiled.copy(current.state), current.frozen)
    seconds = current.epoch_metrics.seconds + time.perf_counter() - started
    told = current.epoch_metrics.row(
        plan.stage.name,
        epoch=progress.epoch,
        step=progress.step,
        validated=validated,
        seconds=seconds,
    )
    skipped = (
        f"{current.epoch_metrics.skipped} steps skipped" if current.epoch_metrics.skipped else ""
    )
    run.console.epoch_row(
        progress.epoch,
        told["train_loss"],
        validated.loss,
        validated.accuracy,
        seconds,
        ", ".join(filter(None, ("best" if improved else "", skipped))),
    )
    run.metrics.write(told)
    if not progress.ended:
        _save(run, program, current)
        return None
    handed_on = current.best if plan.stage.hand_on == "best" else current.shown
    current.tick()
    items = Arrays(handed_on).to_items()
    run.save(current.progress, current.epoch_metrics, items, keep=True)
    return handed_on


def _save(run: Run, program: Program, current: StageState) -> None:
    current.tick()
    run.save(current.progress, current.epoch_metrics, current.items(program))


def _stop(run: Run, program: Program, current: StageState) -> Never:
    """Saves, unless that has been done at this very step, and ends the run."""
    step = current.progress.step
    if run.checkpoints.latest_step() != step:
        _save(run, program, current)
    raise run.interruption.error(
        f"came in stage {program.plan.stage.name!r}, and step {step} is saved. The same command "
        "goes on from there"
    )


def _check_finite(
    run: Run, program: Program, current: StageState, records: list[StepRecord]
) -> None:
    if program.recipe.on_nonfinite == "skip":
        return
    progress, first = current.progress, current.progress.step - len(records) + 1
    for step, record in enumerate(records, first):
        if record.finite:
            continue
        saved = run.checkpoints.latest_step()
        raise NonFiniteError(
            f"stage {program.plan.stage.name!r}, epoch {progress.epoch + 1}, step {step}: "
            + _not_finite(program, current, record)
            + (f"The checkpoint of step {saved} is good. " if saved else "")
            + "With --on-nonfinite skip the same command goes on and leaves such steps out. "
            + _way_out(record, step)
        )


def _not_finite(program: Program, current: StageState, record: StepRecord) -> str:
    """Names what a step made that is not finite."""
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
        "If the loss had been rising, lower rates or a clip_norm make another recipe, for another "
        "--workdir; --fork-from takes over the stages that went well."
    )


def _check_score(run: Run, program: Program, current: StageState, score: Score) -> None:
    progress, saved = current.progress, run.checkpoints.latest_step()
    check_validation(
        run,
        *current.shown[:2],
        score,
        place=f"stage {program.plan.stage.name!r}, epoch {progress.epoch + 1}, "
        f"step {progress.step}",
        remark=", though loss and gradients of all steps are finite"
        + (f". The last checkpoint is that of step {saved}" if saved else ""),
    )


def _done(program: Program, current: StageState) -> str:
    """Why there is no further epoch, if there is none."""
    stage, progress = program.plan.stage, current.progress
    if stage.solver:
        return "it is solved"
    steps = progress.epoch * program.steps_per_epoch + progress.position
    if steps >= program.steps and steps == stage.steps:
        return f"{steps} of {steps} steps done"
    if steps >= program.steps:
        return f"{program.epochs} of {program.epochs} epochs done"
    if stage.minutes and agree(_time_is_up(stage, current)):
        return f"its {stage.minutes:g} minutes are over"
    return ""


def _time_is_up(stage: Stage, current: StageState) -> bool:
    current.tick()
    return stage.minutes is not None and current.progress.seconds >= 60 * stage.minutes


def _advice(run: Run, current: StageState) -> str | None:
    train, metrics = run.splits.train, current.epoch_metrics
    cached = not isinstance(train, Cached) or train.complete
    return Waiting(metrics.seconds, metrics.idle).advice(
        current.progress.epoch,
        workers=run.recipe.workers,
        cores=os.cpu_count() or 1,
        cached=cached,
    )
