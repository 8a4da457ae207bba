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

from jaxft.data import Batch, Cached
from jaxft.errors import NonFiniteError
from jaxft.labels import paths
from jaxft.processes import agree
from jaxft.stages import Stage
from jaxft.train.execution import apart, sent
from jaxft.train.kept import Inputs
from jaxft.train.metrics import EpochMetrics, Score, StepRecord
from jaxft.train.nonfinite import check_validation
from jaxft.train.norms import layer
from jaxft.train.position import Position, shown
from jaxft.train.program import Compiled, Program, Snapshot
from jaxft.train.relative_gradients import BATCHES, set_out
from jaxft.train.run import Run
from jaxft.train.solve import solve
from jaxft.train.waiting import Waiting


def train_stage(run: Run, program: Program, compiled: Compiled, position: Position) -> Snapshot:
    """Trains from `position`, which moves along, to the stage's end; returns what it hands on.

    Raises:
      InterruptedRunError: a signal asked it to stop; it has saved where it was.
      NonFiniteError: what a step makes or the validation loss is not finite, and the recipe has
        it stop.
    """
    start = position.progress
    inputs = Inputs(run, program, compiled, lambda: position.best)
    if program.plan.stage.solver:
        if start.position == 0:  # else only its validation is missing
            solve(run, program, inputs, position)
        handed_on = _end_epoch(run, program, compiled, inputs, position)
        assert handed_on is not None
        return handed_on
    # The step donates its state, and what it comes from is the stage's candidate 0.
    position.state = compiled.copy(position.state)
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
            _train_epoch(run, program, compiled, position, batches)
            handed_on = _end_epoch(run, program, compiled, inputs, position)
            if not advised and (advice := _advice(run, position)):
                run.console.say(advice)
                advised = True  # once a stage: it does not get better
            if handed_on:
                return handed_on


def _train_epoch(
    run: Run, program: Program, compiled: Compiled, position: Position, batches: Iterator[Batch]
) -> None:
    """Takes the steps that the epoch has left, unless its stage's time is up before."""
    recipe, plan = program.recipe, program.plan
    places, every = recipe.steps_per_execution, recipe.checkpoint_steps
    epoch, length = position.progress.epoch, program.epoch_length(position.progress.epoch)
    anchor = run.start if plan.stage.anchor else None  # as the step was compiled
    if position.progress.position == 0:
        if compiled.gauge:
            first = list(islice(batches, min(BATCHES, length)))
            position.state = set_out(
                compiled,
                run.devices,
                position.state,
                position.frozen,
                map(run.devices.batch, first),
                step=position.progress.step,
                start=anchor,
            )
            batches = chain(first, batches)
        state, per_epoch = position.state.opt_state, program.steps_per_epoch
        position.epoch_metrics = EpochMetrics(rates=plan.rates_at(state, steps_per_epoch=per_epoch))
    unseen: list[tuple[StepRecord, int]] = []  # of so many steps each
    idle, mark = 0.0, time.perf_counter()

    def look() -> None:
        nonlocal idle, mark
        fetched = jax.device_get([record for record, _ in unseen])
        counts = [count for _, count in unseen]
        records = [
            own for each in zip(fetched, counts, strict=True) for own in apart(*each, places)
        ]
        _check_finite(run, program, position, records)
        now = time.perf_counter()
        position.epoch_metrics = position.epoch_metrics.plus(records, seconds=now - mark, idle=idle)
        idle, mark = 0.0, now
        unseen.clear()

    with run.console.epoch(epoch + 1, length, position.progress.position) as bar:
        while position.progress.position < length:
            asked = time.perf_counter()
            to_save = every - position.progress.step % every if every else places
            ahead = min(places, to_save, program.alike(epoch, position.progress.position))
            taken = list(islice(batches, ahead))
            # While the step before is at work, nobody waits; and this batch travels meanwhile.
            if not unseen or unseen[-1][0].finite.is_ready():  # type: ignore[attr-defined]
                idle += time.perf_counter() - asked
            sending = sent(run.devices, taken, places)
            number = np.int32(position.progress.step)
            position.state, record = compiled.step(
                position.state, position.frozen, *sending, number, anchor
            )
            position.began = position.began or time.perf_counter()
            for _ in taken:
                position.progress = position.progress.after_step()
            unseen.append((record, len(taken)))
            jax.block_until_ready(unseen[-2:-1])  # or the host fills the device ahead

            last = position.progress.position == length
            synced = last or sum(count for _, count in unseen) >= recipe.sync_steps
            if synced:
                look()
            bar.advance(position.epoch_metrics.metrics.score.loss, len(taken))
            if last:
                return  # validation asks at once whether it is to stop
            if synced or jax.process_count() == 1:
                if run.stop_asked():
                    look()
                    _stop(run, program, position)
                if plan.stage.minutes and agree(_time_is_up(plan.stage, position)):
                    look()
                    return
            if every and position.progress.step % every == 0:
                look()
                _save(run, program, position)


def _end_epoch(
    run: Run, program: Program, compiled: Compiled, inputs: Inputs, position: Position
) -> Snapshot | None:
    """Validates, records and saves; returns what the stage hands on, if that was its end."""
    plan, started = program.plan, time.perf_counter()
    validated = run.evaluate(*position.shown[:2], inputs)
    if validated is None:
        _stop(run, program, position)
    position.validated = time.perf_counter()
    _check_score(run, program, position, validated)
    opt_state = plan.after_epoch(
        position.state.opt_state, loss=validated.loss, accuracy=validated.accuracy
    )
    position.state = position.state._replace(opt_state=run.devices.put(opt_state))
    position.tick()
    progress = position.progress.after_epoch(
        plan.stage,
        validated,
        done=_done(program, position),
        reductions=plan.reductions(opt_state),
    )
    position.progress = progress
    improved = progress.best_epoch == progress.epoch
    if improved:
        position.best = shown(compiled.copy(position.state), position.frozen)
    seconds = position.epoch_metrics.seconds + time.perf_counter() - started
    told = position.epoch_metrics.row(
        plan.stage.name,
        epoch=progress.epoch,
        step=progress.step,
        validated=validated,
        seconds=seconds,
    )
    skipped = (
        f"{position.epoch_metrics.skipped} steps skipped" if position.epoch_metrics.skipped else ""
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
        _save(run, program, position)
        return None
    handed_on = position.best if plan.stage.hand_on == "best" else position.shown
    run.save(position.fields(), handed_on._asdict(), keep=True)
    return handed_on


def _save(run: Run, program: Program, position: Position) -> None:
    run.save(position.fields(), position.arrays(program))


def _stop(run: Run, program: Program, position: Position) -> Never:
    """Saves, unless that has been done at this very step, and ends the run."""
    step = position.progress.step
    if run.checkpoints.latest_step() != step:
        _save(run, program, position)
    raise run.interruption.error(
        f"came in stage {program.plan.stage.name!r}, and step {step} is saved. The same command "
        "goes on from there"
    )


def _check_finite(
    run: Run, program: Program, position: Position, records: list[StepRecord]
) -> None:
    if program.recipe.on_nonfinite == "skip":
        return
    progress, first = position.progress, position.progress.step - len(records) + 1
    for step, record in enumerate(records, first):
        if record.finite:
            continue
        saved = run.checkpoints.latest_step()
        raise NonFiniteError(
            f"stage {program.plan.stage.name!r}, epoch {progress.epoch + 1}, step {step}: "
            + _not_finite(program, position, record)
            + (f"The checkpoint of step {saved} is good. " if saved else "")
            + "With --on-nonfinite skip the same command goes on and leaves such steps out. "
            + _way_out(record, step)
        )


def _not_finite(program: Program, position: Position, record: StepRecord) -> str:
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
    stats = position.state.stats
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


def _check_score(run: Run, program: Program, position: Position, score: Score) -> None:
    progress, saved = position.progress, run.checkpoints.latest_step()
    check_validation(
        run,
        *position.shown[:2],
        score,
        place=f"stage {program.plan.stage.name!r}, epoch {progress.epoch + 1}, "
        f"step {progress.step}",
        remark=", though loss and gradients of all steps are finite"
        + (f". The last checkpoint is that of step {saved}" if saved else ""),
    )


def _done(program: Program, position: Position) -> str:
    """Why there is no further epoch, if there is none."""
    stage, progress = program.plan.stage, position.progress
    if stage.solver:
        return "it is solved"
    steps = progress.epoch * program.steps_per_epoch + progress.position
    if steps >= program.steps and steps == stage.steps:
        return f"{steps} of {steps} steps done"
    if steps >= program.steps:
        return f"{program.epochs} of {program.epochs} epochs done"
    if stage.minutes and agree(_time_is_up(stage, position)):
        return f"its {stage.minutes:g} minutes are over"
    return ""


def _time_is_up(stage: Stage, position: Position) -> bool:
    position.tick()
    return stage.minutes is not None and position.progress.seconds >= 60 * stage.minutes


def _advice(run: Run, position: Position) -> str | None:
    train, metrics = run.splits.train, position.epoch_metrics
    cached = not isinstance(train, Cached) or train.complete
    return Waiting(metrics.seconds, metrics.idle).advice(
        position.progress.epoch,
        workers=run.recipe.workers,
        cores=os.cpu_count() or 1,
        cached=cached,
    )
