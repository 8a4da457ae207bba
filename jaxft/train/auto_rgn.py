"""Relative gradient norms: a tensor's gradient beside the tensor itself, and rates that follow it.

From Lee et al. 2022, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts"
(arXiv:2210.11466), whose Auto-RGN weighs each tensor's rate by the ratio of the two norms.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import jax
import numpy as np

from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch
from jaxft.distributed import Devices
from jaxft.labels import Tree, combine, paths, unflatten
from jaxft.optim.optimizers import restart
from jaxft.train.frozen_prefix import block_labels
from jaxft.train.memory import fitting_memory
from jaxft.train.stage_program import Compiled, Gauge
from jaxft.train.train_step import TrainState
from jaxft.train.trial import Trial

BATCHES = 5
"""So many, the first of an epoch, are measured; as in the authors' `get_lr_weights`."""


def relative_norms(gauges: Sequence[Gauge]) -> dict[str, float]:
    """The mean of ‖gradient‖/‖weights‖ over batches, by label.

    Batches whose gradients are not finite are left out; if all are, there is no ratio. That of
    weights which are all zero is no finite number.
    """
    good = [gauge for gauge in gauges if np.isfinite([*gauge.gradients.values()]).all()]
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            label: float(np.mean([g.gradients[label] / g.weights[label] for g in good]))
            for label in (good[0].gradients if good else ())
        }


def factors(params: Tree, relative: Mapping[str, float]) -> Tree:
    """What the rate of each tensor is times, a tree of floats: its ratio by the largest, 1 at most.

    `relative` is by path. Tensors without a finite ratio do not count, and train at the base rate:
    else a head of zeros would stop all others, and itself.
    """
    finite = {path: ratio for path, ratio in relative.items() if math.isfinite(ratio)}
    largest = max(finite.values(), default=0.0) or 1.0
    return unflatten(params, [finite.get(path, largest) / largest for path in paths(params)])


def block_norms(trial: Trial) -> dict[str, float]:
    """Of each block of a network all of which trains: its whole gradient by all of its weights.

    Raises RecipeError for a batch that does not fit into memory.
    """
    program, model = trial.program, trial.program.model
    with fitting_memory(program):
        gauge = jax.jit(program.gauge(block_labels(model, trial.params)))
        opt_state = program.transform.init(trial.params)  # no step will be taken with it
        state, frozen = program.state(Snapshot(trial.params, trial.stats, opt_state))
        batches = enumerate(trial.batches(BATCHES))
        gauges = [gauge(state, frozen, batch, np.int32(number)) for number, batch in batches]
        norms = relative_norms(jax.device_get(gauges))
    return {block: norms.get(block, math.nan) for block in model.blocks}


def set_out(
    compiled: Compiled,
    devices: Devices,
    state: TrainState,
    frozen: Tree,
    batches: Iterable[Batch],
    *,
    step: int,
    start: Tree | None = None,
) -> TrainState:
    """The state with every optimizer afresh, at rates by the gradients that `batches` have in it.

    compiled: of a stage with relative rates.
    batches: on the devices; `step` is the number of the first.
    start: see `train_step`.
    """
    assert compiled.gauge is not None
    gauges = [
        compiled.gauge(state, frozen, batch, np.int32(number), start)
        for number, batch in enumerate(batches, step)
    ]
    params = combine(state.trainable, frozen)
    found = factors(params, relative_norms(jax.device_get(gauges)))
    opt_state = restart(state.opt_state, compiled.fresh(params), found)
    return state._replace(opt_state=devices.put(opt_state))
