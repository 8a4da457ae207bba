"""Training: a step, an evaluation, a stage, a run."""

from jaxft.train.loop import Result, finetune

__all__ = ["Result", "finetune"]
