"""State of a run within a stage: arrays, counters, best epoch; and how a checkpoint holds them."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import optax

from jaxft.checkpoint.contents import Arrays, Header, Snapshot
from jaxft.early_stopping import EarlyStop, PlateauStop, is_better
from jaxft.labels import Tree, combine, partition, paths, unflatten
from jaxft.models.lora_model import LoraModel
from jaxft.models.norm_modes import layer
from jaxft.optim.carry import carry
from jaxft.optim.schedule_free import evaluation_params, gradient_params
from jaxft.stages import Stage
from jaxft.state_shapes import abstract_state
from jaxft.train.metrics import EpochMetrics, Score
from jaxft.train.stage_program import StageProgram
from jaxft.train.train_step import TrainState


@dataclass(frozen=True)
class Progress:
    """Counters and scores of a run; plain values, without any array.

    Attributes:
      stage: index of the stage.
      epoch: epochs completed in it, with their validation.
      step: steps completed since the run began; numbers the checkpoints.
      score: validation score after the last epoch.
      best: the stage's best score, its start included.
      best_epoch: epoch of the best score; 0 is the stage's start.
      position: steps completed in the current epoch.
      bar: last score that was an improvement to `EarlyStop`.
      waited: epochs since that improvement.
      seconds: time spent on the stage.
      ended: why the stage ended; empty before its end.
      reached_length: whether it ended because its epochs, steps or minutes were over.
      averaged: score of the average of the stage's start and end, if it ends with one.
    """

    stage: int
    epoch: int
    step: int
    score: Score
    best: Score
    bar: Score
    best_epoch: int = 0
    position: int = 0
    waited: int = 0
    seconds: float = 0.0
    ended: str = ""
    reached_length: bool = False
    averaged: Score | None = None

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Progress":
        """Inverts `dataclasses.asdict`, also after a detour through JSON."""
        names = ("score", "best", "bar", "averaged")
        scores = {name: Score(**fields[name]) for name in names if fields.get(name)}
        return cls(**{**fields, **scores})

    @classmethod
    def at_start(cls, stage: int, step: int, score: Score) -> "Progress":
        """Returns the start of a stage, which is its candidate 0 for the best epoch."""
        return cls(stage=stage, epoch=0, step=step, score=score, best=score, bar=score)

    def after_step(self) -> "Progress":
        """Returns the progress one step further into the epoch."""
        return dataclasses.replace(self, step=self.step + 1, position=self.position + 1)

    def after_epoch(
        self, stage: Stage, score: Score, *, done: str = "", reductions: int = 0
    ) -> "Progress":
        """Returns the progress after an epoch and its validation, which may end the stage.

        Args:
          stage: the stage.
          score: validation score.
          done: why the stage has no further epoch, if it has none.
          reductions: how often a `ReduceLROnPlateau` has reduced the learning rate.
        """
        epoch, until = self.epoch + 1, stage.until
        improved = is_better(score, self.best, *stage.best_by)
        rule = until if isinstance(until, EarlyStop) else EarlyStop()
        bar, waited = rule.count(score, self.bar, self.waited, epoch=epoch)
        by_rule = ""
        if isinstance(until, EarlyStop):
            by_rule = until.end_reason(waited, epoch)
        elif isinstance(until, PlateauStop):
            by_rule = until.end_reason(reductions)
        return dataclasses.replace(
            self,
            epoch=epoch,
            position=0,
            score=score,
            best=score if improved else self.best,
            best_epoch=epoch if improved else self.best_epoch,
            bar=bar,
            waited=waited,
            ended=by_rule or done,
            reached_length=bool(done and not by_rule),
        )

    def restored_epoch(self, stage: Stage) -> int:
        """Returns the epoch that an ended stage restores; 0 is its start."""
        return self.best_epoch if stage.restore == "best" else self.epoch

    def restored_score(self, stage: Stage) -> Score:
        """Returns the score of the arrays that the next stage starts from."""
        return self.averaged or (self.best if stage.restore == "best" else self.score)

    def steps_taken_if_reopening(
        self, before: Stage, now: Stage, steps_per_epoch: int
    ) -> int | None:
        """Returns the steps that an ended stage has taken, if its longer form continues it.

        A stage that ended by `EarlyStop` continues if its patience, or its least length, has grown.
        One that ended by `PlateauStop` does not. None: the stage stays ended.
        """
        done = min(before.length(steps_per_epoch), self.epoch * steps_per_epoch)
        if (
            before == now
            or now.linear_probe
            or not self.ended
            or done >= now.length(steps_per_epoch)
        ):
            return None
        if not self.reached_length:
            rule = now.until
            waits = isinstance(rule, EarlyStop) and (
                self.waited < rule.patience or self.epoch < rule.min_epochs
            )
            return done if waits else None
        return done

    def reopened(self, stage: Stage, done: int, steps_per_epoch: int) -> "Progress":
        """Returns the progress of a stage that continues from its end, after `done` steps."""
        epoch, position = divmod(done, steps_per_epoch)
        progress, score = self, self.restored_score(stage)
        if stage.restore == "last":  # the arrays of its best epoch are not known
            progress = dataclasses.replace(progress, best=score, best_epoch=epoch)
        return dataclasses.replace(
            progress, epoch=epoch, position=position, score=score, ended="", reached_length=False,
            averaged=None,
        )  # fmt: skip


class Averaged(NamedTuple):
    """The average with which a stage ends.

    Attributes:
      arrays: its weights, with the optimizer state of the end.
      score: its validation score.
      curve: entry of the metrics row: the chosen alpha, and each metric by alpha.
    """

    arrays: Snapshot
    score: Score
    curve: Mapping[str, Any]


@dataclass
class StageState:
    """State of the stage that is training; the only author of a checkpoint's contents.

    Attributes:
      progress: counters and scores.
      state: arrays that the steps change.
      frozen: the frozen half of the parameters.
      best: arrays of the stage's best epoch so far, as validation saw them.
      epoch_metrics: sums over the current epoch.
      began: time of the stage's first step in this process, by `time.perf_counter`; 0 before.
      validated: end of the stage's last validation, by the same clock.
    """

    progress: Progress
    state: TrainState
    frozen: Tree
    best: Snapshot
    epoch_metrics: EpochMetrics = field(default_factory=EpochMetrics)
    began: float = 0.0
    validated: float = 0.0
    _ticked: float = field(default_factory=time.perf_counter)

    @classmethod
    def at_start(cls, program: StageProgram, progress: Progress, current: Snapshot) -> "StageState":
        """Returns the start of a stage; its arrays are the candidate 0 for the best epoch."""
        state, frozen = program.state(current)
        state = state._replace(trainable=gradient_params(state.opt_state, state.trainable))
        return cls(progress, state, frozen, best=current)

    @classmethod
    def restored(
        cls, program: StageProgram, header: Header, items: Mapping[str, Tree]
    ) -> "StageState":
        """Returns the state in a checkpoint within a stage."""
        arrays = Arrays.from_items(items)
        state, frozen = program.state(arrays.current)
        if arrays.average is not None:
            state = state._replace(average=arrays.average)
        assert arrays.best is not None  # as the stage has not ended
        metrics = EpochMetrics.from_fields(header.epoch_metrics)
        return cls(Progress.from_fields(header.progress), state, frozen, arrays.best, metrics)

    @property
    def shown(self) -> Snapshot:
        """The arrays that validation sees: their average, if the stage has one."""
        return shown(self.state, self.frozen)

    def items(self, program: StageProgram) -> dict[str, Tree]:
        """Returns the arrays of a checkpoint within the stage, by item."""
        trainable, stats, opt_state, average = self.state
        current = Snapshot(combine(trainable, self.frozen), stats, opt_state)
        return Arrays(current, changing(program, self.best), average).to_items()

    def tick(self) -> None:
        """Adds the time since the last tick to the stage's."""
        now = time.perf_counter()
        seconds = self.progress.seconds + now - self._ticked
        self.progress, self._ticked = dataclasses.replace(self.progress, seconds=seconds), now


def header_of(
    progress: Progress,
    epoch_metrics: EpochMetrics,
    *,
    data: Mapping[str, Any],
    recipe: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
) -> Header:
    """Returns the JSON values of a checkpoint; see `Header`."""
    return Header(
        dataclasses.asdict(progress), dataclasses.asdict(epoch_metrics), data, recipe, rows
    )


def shown(state: TrainState, frozen: Tree) -> Snapshot:
    """Returns the arrays that validation sees: the average of a state, or the state itself."""
    evaluated = evaluation_params(state.opt_state, state.trainable)
    trainable, stats, *_ = state.average or (evaluated, state.stats)
    return Snapshot(combine(trainable, frozen), stats, state.opt_state)


def changing(program: StageProgram, snapshot: Snapshot) -> Snapshot:
    """Keeps the arrays that the stage's steps change and replaces all others by None."""
    trainable, _ = partition(snapshot.params, program.plan.labels)
    stats = [
        None if program.norms.get(layer(path), "batch") != "batch" else x
        for path, x in zip(paths(snapshot.stats), jax.tree.leaves(snapshot.stats), strict=True)
    ]
    return snapshot._replace(params=trainable, stats=unflatten(snapshot.stats, stats))


def item_shapes(
    programs: Sequence[StageProgram], stage: int, params: Tree, stats: Tree, *, ended: bool = False
) -> dict[str, Tree]:
    """Returns the items of a checkpoint within a stage, or of its end, as shapes."""
    snapshot = Snapshot(params, stats, opt_state_shapes(programs, stage, params))
    if ended:
        return Arrays(snapshot).to_items()
    average = programs[stage].state(snapshot)[0].average
    return Arrays(snapshot, changing(programs[stage], snapshot), average).to_items()


def opt_state_shapes(programs: Sequence[StageProgram], stage: int, params: Tree) -> optax.OptState:
    """Returns the shapes of a stage's optimizer state, with the parked groups of all before it."""
    plans = [program.plan for program in programs]
    shapes = jax.eval_shape(lambda: params)  # without shardings
    return abstract_state(plans, stage, shapes, programs[stage].recipe.optimizer)


def with_stage_merge(program: StageProgram, snapshot: Snapshot) -> Snapshot:
    """Returns the arrays at the end of the stage before, with adapters merged for `merge_lora`."""
    model, devices = program.model, program.devices
    if not program.plan.stage.merge_lora:
        return snapshot
    assert isinstance(model, LoraModel)  # as the plan has found adapters
    fold = jax.jit(lambda params: devices.constrain(model.merge_and_reset(params)))
    return snapshot._replace(params=fold(snapshot.params))


def next_opt_state(
    program: StageProgram, before: optax.OptState, fresh: optax.OptState
) -> tuple[optax.OptState, list[str]]:
    """Returns the optimizer state at a stage's start, from the stage before; and remarks."""
    if program.plan.stage.carry == "reset":
        return fresh, []
    state, report = carry(before, fresh, park=program.plan.park, report=True)
    return state, list(report.warnings)
