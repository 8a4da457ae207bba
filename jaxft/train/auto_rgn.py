"""Auto-RGN: learning rates that follow the relative gradient norm of each tensor.

From Lee et al. 2022, "Surgical Fine-Tuning Improves Adaptation to Distribution Shifts"
(arXiv:2210.11466), whose Auto-RGN multiplies each tensor's learning rate by the ratio of
the norm of its gradient to its own.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch
from jaxft.devices import Devices
from jaxft.labels import Tree, combine, paths, unflatten
from jaxft.optim.transform import restart
from jaxft.train.compiled_stage import CompiledStage
from jaxft.train.frozen_prefix import block_labels
from jaxft.train.metrics import GradientNorms
from jaxft.train.stage_program import StageProgram
from jaxft.train.train_step import TrainState

BATCHES = 5
"""Number of batches to measure, the first of an epoch; as in the authors' `get_lr_weights`."""


def relative_norms(batches: Sequence[GradientNorms]) -> dict[str, float]:
    """Returns the mean of ‖gradient‖/‖weights‖ over batches, by label.

    Batches with gradients that are not finite are left out; without any other batch the result is
    empty. The ratio of weights that are all zero is not finite.
    """
    good = [norms for norms in batches if np.isfinite([*norms.gradients.values()]).all()]
    with np.errstate(divide="ignore", invalid="ignore"):
        return {
            label: float(np.mean([g.gradients[label] / g.weights[label] for g in good]))
            for label in (good[0].gradients if good else ())
        }


def factors(params: Tree, relative: Mapping[str, float]) -> Tree:
    """Returns the factor of each tensor's learning rate: its ratio over the largest ratio, a tree.

    `relative` is by path. Tensors without a finite ratio do not count and train at the base
    learning rate. Otherwise a head of zeros would stop all tensors.
    """
    finite = {path: ratio for path, ratio in relative.items() if math.isfinite(ratio)}
    largest = max(finite.values(), default=0.0) or 1.0
    return unflatten(params, [finite.get(path, largest) / largest for path in paths(params)])


def block_norms(
    program: StageProgram, params: Tree, stats: Tree, batches: Iterable[Batch]
) -> dict[str, float]:
    """Returns the relative gradient norm of each block of a network.

    Args:
      program: a stage that trains the whole network.
      params, stats: its parameters and statistics.
      batches: training batches on the devices.

    Raises:
      RecipeError: a batch does not fit into memory.
    """
    model = program.model
    with program.fitting_memory():
        measure = jax.jit(program.gradient_norms(block_labels(model, params)))
        opt_state = program.transform().init(params)  # no step will be taken with it
        state, frozen = program.state(Snapshot(params, stats, opt_state))
        measured = [
            measure(state, frozen, batch, np.int32(number)) for number, batch in enumerate(batches)
        ]
        norms = relative_norms(jax.device_get(measured))
    return {block: norms.get(block, math.nan) for block in model.blocks}


def restart_with_auto_rgn(
    compiled: CompiledStage,
    devices: Devices,
    state: TrainState,
    frozen: Tree,
    batches: Iterable[Batch],
    *,
    step: int,
    rest: Sequence[Any] = (None,),
) -> TrainState:
    """Returns the state with a fresh optimizer, its learning rates scaled by the gradients.

    Args:
      compiled: a stage with `auto_rgn`.
      devices: where it runs.
      state, frozen: arrays of the stage.
      batches: batches on the devices.
      step: global step of the first batch.
      rest: further arguments of the step: start, and features in device memory.
    """
    assert compiled.gradient_norms is not None
    measured = [
        compiled.gradient_norms(state, frozen, batch, np.int32(number), *rest)
        for number, batch in enumerate(batches, step)
    ]
    params = combine(state.trainable, frozen)
    lr_factors = factors(params, relative_norms(jax.device_get(measured)))
    opt_state = restart(state.opt_state, compiled.fresh(params), lr_factors)
    return state._replace(opt_state=devices.put(opt_state))
