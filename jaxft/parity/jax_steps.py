"""Our half: the very steps that a run takes, on the batches given."""

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
from jaxft.distributed import Devices
from jaxft.labels import FROZEN, Tree, combine, leaf_labels
from jaxft.models import Model
from jaxft.models.nnx_adapter import NNXModel
from jaxft.models.norm_modes import dotted
from jaxft.parity.step import Arrays, Rows, Step
from jaxft.recipe import Recipe
from jaxft.train.opening import open_programs
from jaxft.train.stage_program import StageProgram
from jaxft.train.state import next_opt_state
from jaxft.weights.key_maps import torch_tensors

# What optax calls what it remembers of each parameter.
_MOMENTS = {
    "trace": "momentum",
    "buffer": "momentum",
    "mu": "mean",
    "nu": "mean square",
}


def jax_steps(
    programs: Sequence[StageProgram],
    start: tuple[Tree, Tree],
    epoch: Sequence[Rows],
    *,
    watch: bool = True,
) -> Iterator[Step]:
    """Trains from `start` through all stages, `epoch` over and over.

    Each stage hands on its last step: there is no validation to choose by. Without `watch` there
    are no outputs of blocks, which take a program of their own.
    """
    devices = programs[0].devices
    at = Snapshot(*devices.put(start), None)
    for stage in programs:
        fresh = stage.transform.init(at.params)
        state = next_opt_state(stage, at.opt_state, fresh)[0] if stage.index else fresh
        at = at._replace(opt_state=devices.put(state))
        at = yield from _stage(stage, at, start[0], epoch, watch)


def network(recipe: Recipe, num_classes: int) -> Model:
    """The recipe's network, computing in the dtype of its images, whatever the recipe says."""
    model = recipe.network(num_classes)
    if not isinstance(model, NNXModel):
        return model
    config: Any = model.config
    return replace(model, config=replace(config, dtype=None))


def programs(
    recipe: Recipe, model: Model, start: tuple[Tree, Tree], epoch: Sequence[Rows]
) -> tuple[StageProgram, ...]:
    """The recipe's stages, over these batches."""
    targets = np.concatenate([rows.targets for rows in epoch])
    nothing = np.zeros((len(targets), 1, 1, 3), np.uint8)
    source = data.arrays(nothing, targets, classes=[str(k) for k in range(model.num_classes)])
    seeing = replace(recipe, cache_mib=0, steps_per_execution=1)  # a step: one batch, of images
    return open_programs(seeing, model, Splits(source, source), Devices(), start)


def _stage(
    program: StageProgram, at: Snapshot, anchor: Tree, epoch: Sequence[Rows], watch: bool
) -> Generator[Step, None, Snapshot]:
    of_params, of_stats = torch_tensors(at.params, at.stats)
    labels = leaf_labels(at.params, program.plan.labels)
    groups = {t.name: g for t, g in zip(jax.tree.leaves(of_params), labels, strict=True)}
    train = jax.jit(program.train_step(keep_gradients=True), donate_argnums=0)
    look = jax.jit(partial(_outputs, program))
    state, frozen = program.state(at)
    state = jax.tree.map(jnp.copy, state)  # the step donates it, and `at` may be the start itself
    for position in range(program.steps):
        rows = epoch[position % len(epoch)]
        batch, count = program.devices.batch(_padded(rows, program.rows)), len(rows.targets)
        rates = program.plan.rates_at(state.opt_state, steps_per_epoch=program.steps_per_epoch)
        params = combine(state.trainable, frozen)
        outputs = look(params, state.stats, batch) if watch else {}
        state, record = train(state, frozen, batch, np.int32(position), anchor)
        at = Snapshot(combine(state.trainable, frozen), state.stats, state.opt_state)
        yield Step(
            rates={name: np.asarray(rates[g]) for name, g in groups.items() if g != FROZEN},
            outputs={block: np.asarray(x)[:count] for block, x in outputs.items()},
            loss={"loss": np.asarray(_minimised(program, record.metrics.loss / count, rows))},
            stats=_as_torch(of_stats, at.stats),
            grads=_as_torch(of_params, record.gradients),
            moments=_moments(of_params, at.opt_state),
            params=_as_torch(of_params, at.params),
        )
    return at


def _outputs(
    program: StageProgram, params: Tree, stats: Tree, batch: Batch
) -> dict[str, jax.Array]:
    """Of each block; of the last, the logits."""
    model, found = program.model, {}
    x = program.recipe.preprocessing.normalize(batch.image)
    for block in model.blocks:
        x, _ = model.apply(
            params, stats, x, norms=program.norms, mask=batch.mask, first=block, last=block
        )
        found[block] = x
    found["logits"] = found.pop(model.blocks[-1])
    return found


def _minimised(program: StageProgram, mean: jax.Array, rows: Rows) -> jax.Array:
    """The loss of a batch, of which a step tells the mean."""
    weights = program.objective.class_weights
    total = np.sum(np.asarray(weights)[rows.targets]) if weights else len(rows.targets)
    return program.objective.reduced(mean, jnp.asarray(total))


def _padded(rows: Rows, size: int) -> Batch:
    spare = size - len(rows.targets)
    image = np.pad(rows.images, ((0, spare), *[(0, 0)] * 3), constant_values=7.0)
    target = np.pad(np.asarray(rows.targets, np.int32), (0, spare))
    return Batch(image, target, np.arange(size) < size - spare)


def _as_torch(named: Tree, tree: Tree) -> Arrays:
    """The arrays of a tree with torch's names and layouts; some leaves may be None."""
    tensors = jax.tree.leaves(named)
    arrays = jax.tree.leaves(tree, is_leaf=lambda x: x is None)
    pairs = zip(tensors, arrays, strict=True)
    return {t.name: t.to_torch(np.asarray(x)) for t, x in pairs if x is not None}


def _moments(named: Tree, opt_state: optax.OptState) -> Arrays:
    """By torch's names, for whichever optimizer has them."""
    tensors, _ = jax.tree_util.tree_flatten_with_path(named)
    by_path = {dotted(path): tensor for path, tensor in tensors}
    found: Arrays = {}
    for group, state in opt_state.inner_states.items():
        if group == FROZEN:
            continue
        for path, leaf in jax.tree_util.tree_flatten_with_path(state.inner_state.rule)[0]:
            field, parameter = _of_parameter(path)
            if field in _MOMENTS:
                tensor = by_path[parameter]
                found[f"{tensor.name}, {_MOMENTS[field]}"] = tensor.to_torch(np.asarray(leaf))
    return found


def _of_parameter(path: tuple[Any, ...]) -> tuple[str, str]:
    """The field of an optimizer's state that a leaf lies in, and the path of its parameter."""
    names = [i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey)]
    return (path[names[-1]].name, dotted(path[names[-1] + 1 :])) if names else ("", "")
