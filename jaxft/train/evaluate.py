"""Evaluation: every example counts once, whatever the batch size."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from jaxft.data import Batch, Preprocessing
from jaxft.labels import Tree
from jaxft.models import Model
from jaxft.train.step import Tally, tally


@dataclass(frozen=True)
class Score:
    """Means over a set of examples: cross entropy in nats, accuracies from 0 to 1."""

    loss: float
    accuracy: float
    top5: float


def score(tallies: Iterable[Tally]) -> Score:
    """The means of many batches' sums; added on the host in float64."""
    rows = np.asarray(jax.device_get(list(tallies)), np.float64)
    loss, correct, top5, examples = np.sum(rows, axis=0)
    return Score(float(loss / examples), float(correct / examples), float(top5 / examples))


def eval_step(
    model: Model, preprocessing: Preprocessing, *, tta: Literal["none", "flip"] = "none"
) -> Callable[[Tree, Tree, Batch], Tally]:
    """The jitted evaluation of one batch, with running statistics.

    With `tta="flip"`, test-time augmentation, the logits are averaged over an image and its mirror.
    Logits, as torchvision's `TenCrop` example does, not probabilities: the mean is logits again, to
    which loss and calibration apply as to any, and its loss is never above the mean of the two.
    """

    def step(params: Tree, stats: Tree, batch: Batch) -> Tally:
        images = preprocessing.normalize(batch.image)
        logits, _ = model.apply(params, stats, images, norms="running")
        if tta == "flip":
            mirrored, _ = model.apply(params, stats, images[:, :, ::-1], norms="running")
            logits = (logits + mirrored) / 2
        return tally(logits, batch.target, batch.mask)

    return jax.jit(step)
