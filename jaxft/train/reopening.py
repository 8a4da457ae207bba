"""Whether a stage that has ended goes on, once its recipe has it longer, and from where."""

import dataclasses

from jaxft.early_stopping import EarlyStop
from jaxft.stages import Stage
from jaxft.train.progress import Progress


def reopened(was: Stage, now: Stage, progress: Progress, steps_per_epoch: int) -> int | None:
    """Returns the steps that an ended stage has taken, if its longer recipe has it go on.

    A stage that ended by `EarlyStop` goes on if its patience, or its least length, has grown; one
    that ended by `Plateau` does not. None if the stage stays ended.
    """
    done = min(was.length(steps_per_epoch), progress.epoch * steps_per_epoch)
    if was == now or now.solver or not progress.ended or done >= now.length(steps_per_epoch):
        return None
    if not progress.ended.endswith((" done", " over")):
        rule = now.until
        waits = isinstance(rule, EarlyStop) and (
            progress.waited < rule.patience or progress.epoch < rule.min_epochs
        )
        return done if waits else None
    return done


def from_end(stage: Stage, progress: Progress, done: int, steps_per_epoch: int) -> Progress:
    """Returns the progress of a stage that goes on from what it handed on, after `done` steps."""
    epoch, position = divmod(done, steps_per_epoch)
    score = progress.handed_on(stage)
    if stage.hand_on == "last":  # the arrays of its best epoch are not known
        progress = dataclasses.replace(progress, best=score, best_epoch=epoch)
    return dataclasses.replace(progress, epoch=epoch, position=position, score=score, ended="")
