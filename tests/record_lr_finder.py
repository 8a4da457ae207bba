"""Records range tests of fastai's `lr_find`, for tests/test_lr_finder.py.

    python tests/record_lr_finder.py

Needs fastai; recorded with fastai 2.8.12 and torch 2.13.0. Each is a line fitted to noisy points.
"""

from math import inf
from pathlib import Path

import numpy as np
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import minimum, steep, valley
from fastai.test_utils import synth_learner

GOLDEN = Path(__file__).parent / "golden" / "lr_finder.npz"
# To divergence, over several epochs; not as far; until it is no number any more; few steps.
CASES = {
    "diverges": {},
    "ends": {"end_lr": 0.05},
    "nan": {"end_lr": 0.05},
    "few": {"num_it": 30, "start_lr": 1e-4},
}
LAST = 60  # of the steps of "nan" that have a loss


class Raw(Callback):
    """Each batch's own, NaN from a step on."""

    def __init__(self, last):
        self.found, self.last = [], last

    def after_loss(self):
        if self.training:
            if len(self.found) >= self.last:
                self.learn.loss = self.learn.loss * float("nan")
            self.found.append(self.learn.loss.item())


def record():
    """By case: learning rates, losses, smoothed losses, and what three rules suggest."""
    for case, (name, options) in enumerate(CASES.items()):
        torch.manual_seed(case)
        losses = Raw(LAST if name == "nan" else inf)
        learner = synth_learner(n_trn=30, cbs=losses)
        rules = (valley, steep, minimum)
        found = learner.lr_find(show_plot=False, suggest_funcs=rules, **options)
        arrays = {
            "lr": learner.recorder.lrs,
            "losses": losses.found,
            "smoothed": [float(x) for x in learner.recorder.losses],
            "suggestions": found,
        }
        yield from ((f"{name}/{what}", np.array(x)) for what, x in arrays.items())


if __name__ == "__main__":
    recorded = dict(record())
    np.savez_compressed(GOLDEN, **recorded)
    for name, array in recorded.items():
        print(name, array.shape, array[-3:])
