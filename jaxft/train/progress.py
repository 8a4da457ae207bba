"""Where a run is, and when a stage ends: plain values, decided without any array."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.stages import Stage
from jaxft.train.evaluate import Score


@dataclass(frozen=True)
class Progress:
    """The position of a run, as its checkpoints hold it.

    Attributes:
      stage: index of the stage.
      epoch: epochs completed in it.
      step: steps completed since the run began; numbers the checkpoints.
      score: by validation, after the last epoch.
      best: the stage's best score, its start included.
      best_epoch: when that was; 0 is the stage's start.
      ended: why the stage ended; empty while it goes on.
    """

    stage: int
    epoch: int
    step: int
    score: Score
    best: Score
    best_epoch: int = 0
    ended: str = ""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Progress":
        """The inverse of `dataclasses.asdict`."""
        scores = {name: Score(**fields[name]) for name in ("score", "best")}
        return cls(**{**fields, **scores})

    @classmethod
    def at_start(cls, stage: int, step: int, score: Score) -> "Progress":
        """The beginning of a stage, which is its candidate 0."""
        return cls(stage=stage, epoch=0, step=step, score=score, best=score)

    def after_epoch(self, stage: Stage, steps: int, score: Score) -> "Progress":
        """The position one epoch of `steps` steps later, and whether that ends the stage."""
        epoch = self.epoch + 1
        monitor = stage.until.monitor if stage.until else "accuracy"
        improved = score.better_than(self.best, monitor)
        best_epoch = epoch if improved else self.best_epoch
        ended = ""
        if stage.until and epoch - best_epoch >= stage.until.patience:
            ended = f"{monitor} has not improved for {epoch - best_epoch} epochs"
        elif epoch >= stage.epochs:
            ended = f"{epoch} of {stage.epochs} epochs done"
        return dataclasses.replace(
            self,
            epoch=epoch,
            step=self.step + steps,
            score=score,
            best=score if improved else self.best,
            best_epoch=best_epoch,
            ended=ended,
        )

    def handed_on(self, stage: Stage) -> Score:
        """The score of what the next stage starts from."""
        return self.best if stage.hand_on == "best" else self.score
