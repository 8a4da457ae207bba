"""The trainer: evaluation, the end of an epoch, checkpoints and stop requests, in every stage."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Never, TypeVar

import jax
import numpy as np

from jaxft import data
from jaxft import recipe_file as recipes
from jaxft.array_cache import ArrayCache
from jaxft.batch_sizes import batch_sizes
from jaxft.checkpoint.checkpoints import Checkpoints
from jaxft.checkpoint.contents import Arrays, Snapshot
from jaxft.data import Batch, Source, Splits
from jaxft.data.fingerprint import record
from jaxft.devices import Devices
from jaxft.distributed import any_process
from jaxft.errors import InterruptedRunError
from jaxft.labels import Tree
from jaxft.losses import LossChoice
from jaxft.progress import track
from jaxft.recipe import Recipe
from jaxft.report.console import Console
from jaxft.report.metrics_log import MetricsLog, to_json
from jaxft.report.nonfinite import first_block, validation_error
from jaxft.steps_per_execution import groups, sent
from jaxft.train.compiled_stage import CompiledStage
from jaxft.train.feature_cache import StageFeatures
from jaxft.train.metrics import EpochMetrics, Metrics, Score
from jaxft.train.phase_clock import PhaseClock
from jaxft.train.signals import Interruption
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import Averaged, Progress, StageState, header_of, shown

T = TypeVar("T")


@dataclass(frozen=True)
class Trainer:
    """Everything that the stages of a run share: evaluation, checkpoints, stop requests.

    Attributes:
      recipe: the run's recipe.
      splits: training and validation images.
      programs: a program for each stage.
      devices: where the run runs.
      eval_steps: see `jaxft.train.eval_step.eval_step`; by the loss of a stage.
      checkpoints: the run's checkpoints.
      metrics: `metrics.jsonl` and TensorBoard.
      console: where it prints.
      interruption: whether a signal has come.
      start: parameters that the run started from, if a stage has an anchor.
      feature_cache: features of frozen prefixes.
      device_cache: those in device memory.
      batch_cache: validation batches; the same cache, unless features are on disk.
      on_epoch_end: receives the metrics row of each epoch.
      clock: seconds outside of the steps.
    """

    recipe: Recipe
    splits: Splits
    programs: tuple[StageProgram, ...]
    devices: Devices
    eval_steps: Mapping[LossChoice, Callable[[Tree, Tree, Batch], Metrics]]
    checkpoints: Checkpoints
    metrics: MetricsLog
    console: Console
    interruption: Interruption
    start: Tree | None
    feature_cache: ArrayCache
    device_cache: ArrayCache
    batch_cache: ArrayCache
    on_epoch_end: Callable[[dict[str, Any]], object] | None
    clock: PhaseClock = field(default_factory=PhaseClock)

    @cached_property
    def data(self) -> dict[str, object]:
        """Facts of the images that must match on resume: see `jaxft.data.fingerprint.record`."""
        return record(self.splits)

    def save(
        self,
        progress: Progress,
        epoch_metrics: EpochMetrics,
        items: Mapping[str, Tree],
        *,
        keep: bool = False,
    ) -> None:
        """Starts to write a checkpoint; see `Checkpoints.save`."""
        header = header_of(
            progress,
            epoch_metrics,
            data=self.data,
            recipe=recipes.fields(self.recipe),
            rows=self.metrics.rows,
        )
        with self.clock.measure("checkpoint"):
            self.checkpoints.save(progress.step, header.to_json(), items, keep=keep)

    def stop_asked(self) -> bool:
        """Returns whether a signal came, to any process; all must ask at the same point."""
        return any_process(self.interruption.signal is not None)

    def features(
        self, program: StageProgram, compiled: CompiledStage, snapshot: Callable[[], Snapshot]
    ) -> StageFeatures:
        """Returns the cached features of a stage; `snapshot` returns its arrays at any step."""
        return StageFeatures(
            program,
            compiled,
            snapshot,
            self.splits,
            self.devices,
            self.device_cache if program.prefix.on_devices else self.feature_cache,
            self.of_each_batch,
        )

    def evaluate(
        self,
        program: StageProgram,
        params: Tree,
        stats: Tree,
        features: StageFeatures | None = None,
    ) -> Score | None:
        """Returns the score on the validation images, each counted once; None if a signal came.

        Args:
          program: the stage, whose loss is computed.
          params, stats: the weights.
          features: the stage's cached features, to start from them if there are any.
        """
        val, steps_per_call = self.splits.val, self.recipe.steps_per_execution
        if features is None or features.compiled.score is None:
            step = partial(self.eval_steps[program.loss.function], params, stats)
            batches = self.of_each_batch(val, step, steps_per_call=steps_per_call, replayed=True)
        elif (rows := features.val()) is None:
            return None
        else:
            score, rest = features.compiled.score, list[Any]()
            if program.prefix.on_devices:
                rows, rest = np.arange(len(val), dtype=np.int32), [rows]
            size = program.settings.batch_size
            batches = self.of_each_batch(
                val,
                lambda *batch: score(params, stats, *batch, *rest),
                batch_size=size,
                steps_per_call=steps_per_call,
                padded=True,
                features=rows,
            )
        return None if batches is None else Metrics.total(batches).score

    def end_epoch(
        self,
        program: StageProgram,
        compiled: CompiledStage,
        features: StageFeatures,
        current: StageState,
        *,
        done: Callable[[], str],
        finish: Callable[[Snapshot, Score], Averaged] | None = None,
    ) -> Snapshot | None:
        """Validates, writes the metrics row, saves a checkpoint and calls `on_epoch_end`.

        Args:
          program, compiled: the stage.
          features: cached features of the stage.
          current: state of the stage, which moves to the end of the epoch.
          done: returns why the stage has no further epoch; empty if it has one.
          finish: averages the arrays at the end of the stage, which have this score, with those at
            its start; None: no averages.

        Returns:
          The arrays that the next stage starts from; None if the stage has not ended.

        Raises:
          InterruptedRunError: a signal asked the run to stop.
          NonFiniteError: the validation loss is not finite, and the recipe stops then.
        """
        plan, started = program.plan, time.perf_counter()
        with self.clock.measure("validation"):
            validated = self.evaluate(program, *current.shown[:2], features)
        if validated is None:
            self.stop(program, current)
        current.validated = time.perf_counter()
        before, saved = current.progress, self.checkpoints.latest_step()
        self.check_validation(
            *current.shown[:2],
            validated,
            place=f"stage {plan.stage.name!r}, epoch {before.epoch + 1}, step {before.step}",
            remark=", though loss and gradients of all steps are finite"
            + (f". The last checkpoint is that of step {saved}" if saved else ""),
        )
        opt_state = plan.after_epoch(
            current.state.opt_state, loss=validated.loss, accuracy=validated.accuracy
        )
        state = current.state._replace(opt_state=self.devices.put(opt_state))
        current.tick()
        progress = current.progress.after_epoch(
            plan.stage, validated, done=done(), reductions=plan.reductions(opt_state)
        )
        improved, best = progress.best_epoch == progress.epoch, current.best
        if improved:
            best = shown(compiled.copy(state), current.frozen)
        metrics = current.epoch_metrics
        skipped = f"{metrics.skipped} steps skipped" if metrics.skipped else ""
        self.console.epoch_row(
            progress.epoch,
            metrics.metrics.score.loss,
            validated,
            metrics.seconds + time.perf_counter() - started,
            ", ".join(filter(None, ("best" if improved else "", skipped))),
        )
        end, curve = None, dict[str, Any]()
        if progress.ended:
            end = best if plan.stage.restore == "best" else shown(state, current.frozen)
            if finish and progress.restored_epoch(plan.stage):  # otherwise it ends as it started
                averaged = finish(end, progress.restored_score(plan.stage))
                progress = replace(progress, averaged=averaged.score)
                end, curve = averaged.arrays, {"wise": averaged.curve}
        row = (
            metrics.row(
                plan.stage.name,
                epoch=progress.epoch,
                step=progress.step,
                validated=validated,
                seconds=metrics.seconds + time.perf_counter() - started,
            )
            | self.clock.take()
            | curve
        )
        current.state, current.best, current.progress = state, best, progress
        self.metrics.write(row)
        if end:
            current.tick()
            self.save(current.progress, metrics, Arrays(end).to_items(), keep=True)
        else:
            self.save_within(program, current)
        if self.on_epoch_end is not None:
            self.on_epoch_end(to_json(row))  # after the save: it may raise
        return end

    def check_validation(
        self, params: Tree, stats: Tree, score: Score, *, place: str, remark: str = ""
    ) -> None:
        """Checks the validation loss of these weights, at a place such as "epoch 1".

        Raises:
          NonFiniteError: it is NaN or infinite, and the recipe does not skip what is not finite.
        """
        if math.isfinite(score.loss) or self.recipe.on_nonfinite == "skip":
            return
        block = first_block(
            self.programs[0].model,
            self.recipe.preprocessing,
            params,
            stats,
            partial(self.of_each_batch, self.splits.val),
        )
        raise validation_error(score, place=place, remark=remark, block=block)

    def save_within(self, program: StageProgram, current: StageState) -> None:
        """Starts to write a checkpoint within the stage."""
        current.tick()
        self.save(current.progress, current.epoch_metrics, current.items(program))

    def save_step(self, program: StageProgram, current: StageState) -> int:
        """Saves a checkpoint, unless this step has one; returns the step."""
        step = current.progress.step
        if self.checkpoints.latest_step() != step:
            self.save_within(program, current)
        return step

    def stop(self, program: StageProgram, current: StageState) -> Never:
        """Saves a checkpoint, unless this step has one, and raises InterruptedRunError."""
        step = self.save_step(program, current)
        raise self.interruption.error(
            f"came in stage {program.plan.stage.name!r}, and step {step} is saved. The same "
            "command resumes from there"
        )

    def of_each_batch(
        self,
        source: Source,
        step: Callable[..., T],
        *,
        batch_size: int | None = None,
        steps_per_call: int = 1,
        replayed: bool = False,
        padded: bool = False,
        title: str = "Validation",
        **instead: Any,
    ) -> list[T] | None:
        """Calls a compiled step for the source's images in their order, each seen once.

        Args:
          source: the images.
          step: see `jaxft.train.compiled_stage.sent` for its arguments.
          batch_size: the recipe's by default.
          steps_per_call: number of batches that `step` receives at once.
          replayed: whether batches may come from memory, as those to validate may.
          padded: whether the last batch has the rows of a full one, also for a network without a
            mask. Frozen blocks compute the features of each image by itself.
          title: name of the work in its progress bar.
          instead: arguments of `jaxft.data.eval_batches` that replace the evaluation view.

        Returns:
          The result of each call; None if a signal came.
        """
        recipe, size = self.recipe, batch_size or self.recipe.batch_size
        sizes = batch_sizes(self.programs[0].model, self.devices, len(source), size)
        batches = data.eval_batches(
            source,
            recipe.preprocessing,
            batch_size=size,
            workers=recipe.workers,
            rows=sizes.rows,
            last_rows=sizes.rows if padded else sizes.last_rows,
            shard=self.devices.shard,
            **instead,
        )
        count = data.steps_per_epoch(source, size)
        if replayed:
            batches = self.batch_cache.replayed(("images", size), batches, count)
        results: list[T] = []
        with closing(batches), track(title, count, "batches") as work:
            for index, group in enumerate(groups(batches, steps_per_call)):
                results.append(step(*sent(self.devices, group, steps_per_call)))
                jax.block_until_ready(results[-2:-1])  # limits the batches queued on the device
                work.advance(len(group))
                if (
                    index * steps_per_call % recipe.sync_steps < steps_per_call
                    and self.stop_asked()
                ):
                    return None
        return results

    def stopped(self) -> InterruptedRunError:
        """Returns the error of a run that a signal has stopped, and that has nothing to save."""
        saved = self.checkpoints.latest_step()
        where = f"step {saved} is saved" if saved else "nothing has been trained yet"
        return self.interruption.error(f"came, and {where}. The same command resumes from there")
