"""Training: a step, an evaluation, a stage, a run."""

from jaxft.train.finetune import Result, finetune

__all__ = ["Result", "finetune"]
