"""Where a run is, and when a stage ends: plain values, decided without any array."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.early_stopping import EarlyStop, Mode, Monitor, Plateau, default_mode
from jaxft.stages import Stage
from jaxft.train.metrics import Score


@dataclass(frozen=True)
class Progress:
    """The position of a run, as its checkpoints hold it.

    Attributes:
      stage: index of the stage.
      epoch: epochs completed in it, with their validation.
      step: steps completed since the run began; numbers the checkpoints.
      score: by validation, after the last epoch.
      best: the stage's best score, its start included.
      best_epoch: when that was; 0 is the stage's start.
      position: steps completed in the epoch that is under way.
      bar: the last score that was an improvement to `EarlyStop`.
      waited: epochs since.
      seconds: spent on the stage.
      ended: why the stage ended; empty while it goes on.
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

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Progress":
        """The inverse of `dataclasses.asdict`."""
        scores = {name: Score(**fields[name]) for name in ("score", "best", "bar")}
        return cls(**{**fields, **scores})

    @classmethod
    def at_start(cls, stage: int, step: int, score: Score) -> "Progress":
        """The beginning of a stage, which is its candidate 0."""
        return cls(stage=stage, epoch=0, step=step, score=score, best=score, bar=score)

    def after_step(self) -> "Progress":
        """One step further into the epoch."""
        return dataclasses.replace(self, step=self.step + 1, position=self.position + 1)

    def after_epoch(
        self, stage: Stage, score: Score, *, done: str = "", reductions: int = 0
    ) -> "Progress":
        """The position once an epoch is validated, and whether that ends the stage.

        done: why the stage has no further epoch, if it has none.
        reductions: how often a `ReduceLROnPlateau` has reduced the rate.
        """
        epoch, until = self.epoch + 1, stage.until
        improved = _better(score, self.best, *stage.best_by)
        rule = until if isinstance(until, EarlyStop) else EarlyStop()
        bar = self.bar if self.epoch or rule.baseline == "start" else _NOTHING
        mode = rule.mode or default_mode(rule.monitor)
        cleared = _better(score, bar, rule.monitor, mode, by=rule.min_delta)
        waited = 0 if cleared else self.waited + 1
        if isinstance(until, EarlyStop) and waited >= until.patience and epoch >= until.min_epochs:
            margin = f" by more than {until.min_delta:g}" if until.min_delta else ""
            plural = "s" * (waited > 1)
            done = f"{until.monitor} has not improved{margin} for {waited} epoch{plural}"
        if isinstance(until, Plateau) and reductions > until.reductions:
            done = f"the rate met its plateau number {reductions}"
        return dataclasses.replace(
            self,
            epoch=epoch,
            position=0,
            score=score,
            best=score if improved else self.best,
            best_epoch=epoch if improved else self.best_epoch,
            bar=score if cleared else bar,
            waited=waited,
            ended=done,
        )

    def handed_on(self, stage: Stage) -> Score:
        """The score of what the next stage starts from."""
        return self.best if stage.hand_on == "best" else self.score


# Any number is better.
_NOTHING = Score(loss=math.nan, accuracy=math.nan, top5=math.nan)


def _better(new: Score, old: Score, monitor: Monitor, mode: Mode, by: float = 0.0) -> bool:
    """Whether `new` is strictly better by more than a margin; every number is better than NaN."""
    ours, theirs = getattr(new, monitor), getattr(old, monitor)
    if math.isnan(theirs):
        return not math.isnan(ours)
    return bool(ours + by < theirs if mode == "min" else ours - by > theirs)
