"""Where a stage is, with all its arrays: what each step moves, and what a checkpoint holds."""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from jaxft.labels import Tree, combine, filled, partition, paths, unflatten
from jaxft.train.metrics import EpochMetrics
from jaxft.train.norms import layer
from jaxft.train.program import Program, Snapshot
from jaxft.train.progress import Progress
from jaxft.train.step import TrainState


@dataclass
class Position:
    """A stage under way.

    Attributes:
      progress: the counts.
      state, frozen: the arrays, as the steps have them.
      best: those of the stage's best epoch so far, as validation saw them.
      epoch_metrics: of the epoch that is under way.
      began: when the stage's first step since a start began, by `time.perf_counter`; 0 before.
      validated: when its last validation so far was over, likewise.
    """

    progress: Progress
    state: TrainState
    frozen: Tree
    best: Snapshot
    epoch_metrics: EpochMetrics
    began: float = 0.0
    validated: float = 0.0
    _ticked: float = field(default_factory=time.perf_counter)

    @property
    def shown(self) -> Snapshot:
        """The arrays as validation sees them: their average, where the stage has one."""
        return shown(self.state, self.frozen)

    def arrays(self, program: Program) -> dict[str, Tree]:
        """The items of a checkpoint of a stage that goes on."""
        trainable, stats, opt_state, average = self.state
        now = Snapshot(combine(trainable, self.frozen), stats, opt_state)
        items = {**now._asdict(), "best": changing(program, self.best)._asdict()}
        return items if average is None else {**items, "average": list(average)}

    def fields(self) -> dict[str, Any]:
        """Its progress as JSON."""
        self.tick()
        return {
            **dataclasses.asdict(self.progress),
            "epoch_metrics": dataclasses.asdict(self.epoch_metrics),
        }

    def tick(self) -> None:
        """Counts the time since the last tick as the stage's."""
        now = time.perf_counter()
        seconds = self.progress.seconds + now - self._ticked
        self.progress, self._ticked = dataclasses.replace(self.progress, seconds=seconds), now


def shown(state: TrainState, frozen: Tree) -> Snapshot:
    """The average of a state, where it has one, or else itself."""
    trainable, stats = state.average or (state.trainable, state.stats)
    return Snapshot(combine(trainable, frozen), stats, state.opt_state)


def changing(program: Program, at: Snapshot) -> Snapshot:
    """What of the arrays a stage's steps change, and None for what they leave as it is."""
    trainable, _ = partition(at.params, program.plan.labels)
    stats = [
        None if program.norms.get(layer(path), "batch") != "batch" else x
        for path, x in zip(paths(at.stats), jax.tree.leaves(at.stats), strict=True)
    ]
    return at._replace(params=trainable, stats=unflatten(at.stats, stats))


def at_start(program: Program, progress: Progress, current: Snapshot) -> Position:
    """The position at a stage's start, whose arrays are its candidate 0."""
    state, frozen = program.state(current)
    return Position(progress, state, frozen, best=current, epoch_metrics=EpochMetrics())


def restored(
    program: Program, progress: Progress, epoch_metrics: EpochMetrics, arrays: Mapping[str, Tree]
) -> Position:
    """The position that a checkpoint holds, whose items are `arrays`."""
    items = dict(arrays)
    best, average = Snapshot(**items.pop("best")), items.pop("average", None)
    now = Snapshot(**items)
    best = best._replace(
        params=filled(best.params, now.params), stats=filled(best.stats, now.stats)
    )
    state, frozen = program.state(now)
    if average is not None:
        state = state._replace(average=tuple(average))
    return Position(progress, state, frozen, best, epoch_metrics)
