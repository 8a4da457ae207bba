"""Runs a recipe's training steps on given batches and records each step.

The steps are compiled by the same code as in `finetune`.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import data
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Splits
from jaxft.devices import Devices
from jaxft.labels import FROZEN, Tree, combine, leaf_labels
from jaxft.models import Model
from jaxft.models.nnx_adapter import NNXModel
from jaxft.models.norm_modes import dotted
from jaxft.parity.step import Arrays, NumpyBatch, Step
from jaxft.recipe import Recipe
from jaxft.train.stage_program import StageProgram, build_programs
from jaxft.train.state import next_opt_state
from jaxft.weights.key_maps import torch_tensors

# Fields of optax states that hold a moment of each parameter.
_MOMENTS = {
    "trace": "momentum",
    "buffer": "momentum",
    "mu": "mean",
    "nu": "mean square",
}


def jax_steps(
    programs: Sequence[StageProgram],
    start: tuple[Tree, Tree],
    epoch: Sequence[NumpyBatch],
    *,
    record_outputs: bool = True,
) -> Iterator[Step]:
    """Trains from `start` through all stages and yields each step.

    Each stage starts from the last step of the stage before it, because nothing is validated.

    Args:
      programs: the stages.
      start: `(params, stats)`.
      epoch: the batches of one epoch; every epoch is the same.
      record_outputs: whether steps have the outputs of blocks, which need a separate program.
    """
    devices = programs[0].devices
    snapshot = Snapshot(*devices.put(start), None)
    for program in programs:
        fresh = program.transform().init(snapshot.params)
        opt_state = (
            next_opt_state(program, snapshot.opt_state, fresh)[0] if program.index else fresh
        )
        snapshot = snapshot._replace(opt_state=devices.put(opt_state))
        snapshot = yield from _stage_steps(program, snapshot, start[0], epoch, record_outputs)


def network(recipe: Recipe, num_classes: int) -> Model:
    """Builds the recipe's network without its compute dtype: it computes in the images' dtype."""
    model = recipe.network(num_classes)
    if not isinstance(model, NNXModel):
        return model
    config: Any = model.config
    return replace(model, config=replace(config, dtype=None))


def programs(
    recipe: Recipe, model: Model, start: tuple[Tree, Tree], epoch: Sequence[NumpyBatch]
) -> tuple[StageProgram, ...]:
    """Builds the programs of the recipe's stages for an epoch of these batches."""
    targets = np.concatenate([batch.targets for batch in epoch])
    placeholders = np.zeros((len(targets), 1, 1, 3), np.uint8)
    source = data.arrays(placeholders, targets, classes=[str(k) for k in range(model.num_classes)])
    # One batch of images per step: no feature cache, no stacked batches.
    recipe = replace(recipe, cache_mib=0, steps_per_execution=1)
    return build_programs(recipe, model, Splits(source, source), Devices(), start)


def _stage_steps(
    program: StageProgram,
    snapshot: Snapshot,
    anchor: Tree,
    epoch: Sequence[NumpyBatch],
    record_outputs: bool,
) -> Generator[Step, None, Snapshot]:
    """Yields the steps of one stage and returns the arrays after the last one."""
    param_tensors, stat_tensors = torch_tensors(snapshot.params, snapshot.stats)
    labels = leaf_labels(snapshot.params, program.plan.labels)
    groups = {t.name: g for t, g in zip(jax.tree.leaves(param_tensors), labels, strict=True)}
    train_step = jax.jit(program.train_step(keep_gradients=True), donate_argnums=0)
    block_outputs = jax.jit(partial(_block_outputs, program))
    state, frozen = program.state(snapshot)
    # The step donates the state, which may hold the arrays of the start.
    state = jax.tree.map(jnp.copy, state)
    for position in range(program.steps):
        rows = epoch[position % len(epoch)]
        count = len(rows.targets)
        batch = program.devices.batch(_padded(rows, program.sizes.rows))
        lr = program.plan.lr_at(state.opt_state, steps_per_epoch=program.steps_per_epoch)
        params = combine(state.trainable, frozen)
        outputs = block_outputs(params, state.stats, batch) if record_outputs else {}
        state, record = train_step(state, frozen, batch, np.int32(position), anchor)
        snapshot = Snapshot(combine(state.trainable, frozen), state.stats, state.opt_state)
        loss = _training_loss(program, record.metrics.loss / count, rows)
        yield Step(
            lr={name: np.asarray(lr[g]) for name, g in groups.items() if g != FROZEN},
            outputs={block: np.asarray(x)[:count] for block, x in outputs.items()},
            loss={"loss": np.asarray(loss)},
            stats=_to_torch(stat_tensors, snapshot.stats),
            grads=_to_torch(param_tensors, record.gradients),
            moments=_moments(param_tensors, snapshot.opt_state),
            params=_to_torch(param_tensors, snapshot.params),
        )
    return snapshot


def _block_outputs(
    program: StageProgram, params: Tree, stats: Tree, batch: Batch
) -> dict[str, jax.Array]:
    """Computes the output of each block; the output of the last block is called `logits`."""
    model, outputs = program.model, {}
    x = program.recipe.preprocessing.normalize(batch.image)
    for block in model.blocks:
        x, _ = model.apply(
            params, stats, x, norms=program.norms, mask=batch.mask, first=block, last=block
        )
        outputs[block] = x
    outputs["logits"] = outputs.pop(model.blocks[-1])
    return outputs


def _training_loss(program: StageProgram, mean: jax.Array, batch: NumpyBatch) -> jax.Array:
    """Computes the loss that the stage minimises from the mean loss of a batch."""
    weights = program.loss.class_weights
    total = np.sum(np.asarray(weights)[batch.targets]) if weights else len(batch.targets)
    return program.loss.reduced(mean, jnp.asarray(total))


def _padded(batch: NumpyBatch, size: int) -> Batch:
    """Pads a batch to `size` rows."""
    padding = size - len(batch.targets)
    # Not zeros, so that padding which enters a result changes it.
    image = np.pad(batch.images, ((0, padding), *[(0, 0)] * 3), constant_values=7.0)
    target = np.pad(np.asarray(batch.targets, np.int32), (0, padding))
    return Batch(image, target, np.arange(size) < size - padding)


def _to_torch(tensors: Tree, tree: Tree) -> Arrays:
    """Converts the arrays of a tree to torch's names and layouts; leaves out None."""
    arrays = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    pairs = zip(jax.tree.leaves(tensors), arrays, strict=True)
    return {t.name: t.to_torch(np.asarray(x)) for t, x in pairs if x is not None}


def _moments(tensors: Tree, opt_state: optax.OptState) -> Arrays:
    """Returns the moments of any optimizer, by torch's name of the parameter and the moment."""
    by_path = {
        dotted(path): tensor for path, tensor in jax.tree_util.tree_flatten_with_path(tensors)[0]
    }
    moments: Arrays = {}
    for group, state in opt_state.inner_states.items():
        if group == FROZEN:
            continue
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.inner_state.rule)[0]:
            field, parameter = _field_and_parameter(path)
            if field in _MOMENTS:
                tensor = by_path[parameter]
                moments[f"{tensor.name}, {_MOMENTS[field]}"] = tensor.to_torch(np.asarray(leaf))
    return moments


def _field_and_parameter(path: tuple[Any, ...]) -> tuple[str, str]:
    """Splits a leaf's path in an optimizer state into the field and the parameter's path."""
    fields = [i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)]
    return (path[fields[-1]].name, dotted(path[fields[-1] + 1 :])) if fields else ("", "")
