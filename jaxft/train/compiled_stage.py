"""The compiled programs of a stage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch
from jaxft.labels import Tree
from jaxft.steps_per_execution import several_steps
from jaxft.train.eval_step import eval_step
from jaxft.train.feature_storage import DeviceStorage
from jaxft.train.frozen_prefix import compile_prefix
from jaxft.train.metrics import GradientNorms
from jaxft.train.stage_program import StageProgram
from jaxft.train.train_step import TrainState

S = TypeVar("S")

_INDEX: tuple[tuple[int, ...], np.dtype[Any]] = (), np.dtype(np.int32)
"""Shape and dtype of the index of an image whose features are in device memory."""


class CompiledStage(NamedTuple):
    """Programs of a stage, compiled for its shapes.

    Attributes:
      fresh: `params -> opt_state`, the state of the optimizer before its first step.
      copy: copies a training state to other buffers.
      step: `(state, frozen, batch, number, start) -> (state, record)`, see `train_step`; `number`
        is the global step. The state is donated. With `steps_per_execution` above 1, batches and
        records are stacked, and the number of batches follows them. With features in device memory,
        they are the last argument. None for a linear probe.
      gradient_norms: see `StageProgram.gradient_norms`; by tensor. None without `auto_rgn`.
      prefix: see `compile_prefix`; empty if nothing of the prefix is cached.
      score: see `eval_step`; of batches of features, or of indices and the features in device
        memory. None: they are not cached.
      flops: floating-point operations of a step.
      prefix_flops: floating-point operations of the prefix on a batch.
    """

    fresh: Callable[[Tree], optax.OptState]
    copy: Callable[[TrainState], TrainState]
    step: Any
    gradient_norms: Callable[..., GradientNorms] | None
    prefix: Mapping[str, Callable[[Tree, Tree, jax.Array], jax.Array]]
    score: Callable[..., Any] | None
    flops: float
    prefix_flops: float


@dataclass(frozen=True)
class ByRows:
    """Compiled programs of one function, by the number of rows of the batch they receive.

    Attributes:
      programs: a compiled program for each number of rows.
      full: rows of a full batch.
    """

    programs: Mapping[int, Any]
    full: int

    def __call__(self, state: TrainState, frozen: Tree, batch: Batch, *rest: Any) -> Any:
        """Calls the program for batches like this one."""
        return self.programs[batch.mask.shape[-1]](state, frozen, batch, *rest)

    def cost_analysis(self) -> Any:
        """Returns XLA's cost analysis of a full batch."""
        return self.programs[self.full].cost_analysis()

    def memory_analysis(self) -> Any:
        """Returns XLA's memory analysis of a full batch."""
        return self.programs[self.full].memory_analysis()

    def as_text(self) -> str:
        """Returns the program of a full batch."""
        return str(self.programs[self.full].as_text())


def flops(compiled: Any) -> float:
    """Returns the floating-point operations of one call on each device, as XLA counts them."""
    return float((compiled.cost_analysis() or {}).get("flops", 0.0))


def compile_stage(program: StageProgram, shapes: Snapshot) -> CompiledStage:
    """Compiles the programs of a stage for arrays of these shapes at its start."""
    stage, recipe, devices = program.plan.stage, program.recipe, program.devices
    prefix, steps_per_call = program.prefix, recipe.steps_per_execution
    state, frozen = devices.abstract(program.state(shapes))
    params, stats = devices.abstract((shapes.params, shapes.stats))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    start = params if stage.anchor else None
    images = _batch_shapes(program, *_image_row(program))
    features, example = list[Any](), _training_row(program)
    if prefix.train and prefix.on_devices:
        features, example = [_device_features(program, "train")], _INDEX

    def init_optimizer(params: Tree) -> optax.OptState:
        return devices.constrain(program.transform().init(params))

    def copy(state: TrainState) -> TrainState:
        return devices.constrain(jax.tree.map(jnp.copy, state))

    def compiled(function: Any, steps_per_call: int, *rest: Any) -> Any:
        counts = {program.sizes.rows}
        if program.epoch_length(0) == program.steps_per_epoch:  # the stage reaches a last batch
            counts.add(program.sizes.last_rows)
        programs = {}
        for rows in sorted(counts, reverse=True):
            batches = _batch_shapes(program, *example, rows=rows, steps_per_call=steps_per_call)
            programs[rows] = devices.lower(function, state, frozen, batches, *rest).compile()
        full = program.sizes.rows
        return programs[full] if len(programs) == 1 else ByRows(programs, full)

    step = norms = score = None
    if not stage.linear_probe:
        function, numbers = _from_devices(program, program.train_step()), [number]
        if steps_per_call > 1:
            function, numbers = several_steps(function, devices), [number, number]
        step = jax.jit(function, donate_argnums=0)
        step = compiled(step, steps_per_call, *numbers, start, *features)
    if stage.auto_rgn:
        measure = _from_devices(program, program.gradient_norms(program.tensor_labels()))
        norms = compiled(jax.jit(measure), 1, number, start, *features)
    through: dict[str, Any] = {}
    if prefix.row and prefix.val:
        like = (params, stats, images.image)
        through = compile_prefix(
            program.model, recipe.preprocessing, devices, prefix.cuts, like, recipe.matmul_precision
        )
        row = (2 if recipe.tta == "flip" else 1, *prefix.row.shape)
        scoring = eval_step(
            program.model,
            recipe.preprocessing,
            first=prefix.first,
            steps_per_call=steps_per_call,
            loss=program.loss.function,
            metrics=recipe.metrics,
            precision=recipe.matmul_precision,
            take=partial(DeviceStorage(devices, prefix.batch_size).take_in_order, row=row),
        )
        rest: list[Any] = [number] * (steps_per_call > 1)
        val_example = row, prefix.row.dtype
        if prefix.on_devices:
            rest.append(_device_features(program, "val"))
            val_example = _INDEX
        batches = _batch_shapes(program, *val_example, steps_per_call=steps_per_call)
        score = devices.lower(scoring, params, stats, batches, *rest).compile()
    return CompiledStage(
        devices.lower(jax.jit(init_optimizer), params).compile(),
        devices.lower(jax.jit(copy), state).compile(),
        step,
        norms,
        through,
        score,
        flops(step) * stage.accumulate if step else 0.0,  # XLA counts a loop's body once
        sum(map(flops, through.values())),
    )


def step_shapes(program: StageProgram, start: tuple[Tree, Tree]) -> tuple[Any, ...]:
    """Returns the shapes `(state, frozen, batch, number, start)` of a stage's first step.

    They are the arguments of `StageProgram.train_step`, with a full batch.

    Args:
      program: the stage.
      start: parameters and statistics, or their shapes.
    """
    params, stats = start
    opt_state = jax.eval_shape(program.transform().init, params)
    snapshot = Snapshot(params, stats, opt_state)
    state, frozen = program.devices.abstract(program.state(snapshot))
    batch = _batch_shapes(program, *_training_row(program))
    anchor = program.devices.abstract(params) if program.plan.stage.anchor else None
    return state, frozen, batch, jax.ShapeDtypeStruct((), jnp.int32), anchor


def _image_row(program: StageProgram) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Returns shape and dtype of an image."""
    side = program.recipe.preprocessing.image_size
    return (side, side, 3), np.dtype(program.pixels)


def _training_row(program: StageProgram) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Returns shape and dtype of an example of a step: an image, or its cached features."""
    prefix = program.prefix
    if prefix.row and prefix.train:
        return prefix.row.shape, prefix.row.dtype
    return _image_row(program)


def _device_features(program: StageProgram, split: Literal["train", "val"]) -> jax.ShapeDtypeStruct:
    """Returns the shape of the features of a split in device memory."""
    prefix = program.prefix
    assert prefix.row
    flips = 2 if split == "val" and program.recipe.tta == "flip" else 1
    row = jax.ShapeDtypeStruct((flips, *prefix.row.shape), prefix.row.dtype)
    storage = DeviceStorage(program.devices, prefix.batch_size)
    return storage.shape(prefix.images[split == "val"], row)


def _from_devices(program: StageProgram, step: Callable[..., S]) -> Callable[..., S]:
    """Returns a step that takes features from device memory, if the stage's are there.

    Its batches hold indices of images, and its last argument is the features.
    """
    prefix = program.prefix
    if not (prefix.row and prefix.train and prefix.on_devices):
        return step
    row, storage = prefix.row.shape, DeviceStorage(program.devices, prefix.batch_size)

    def from_devices(state: TrainState, frozen: Tree, batch: Batch, *rest: Any) -> S:
        batch = batch._replace(image=storage.take(rest[-1], batch, row))
        return step(state, frozen, batch, *rest[:-1])

    return from_devices


def _batch_shapes(
    program: StageProgram,
    row: tuple[int, ...],
    dtype: np.dtype[Any],
    *,
    rows: int | None = None,
    steps_per_call: int = 1,
) -> Batch:
    """Returns the shapes of a batch of such rows, or of several stacked batches."""
    axes: tuple[int, ...] = (rows or program.sizes.rows,)
    if steps_per_call > 1:
        axes = (steps_per_call, *axes)
    target = (*axes, program.model.num_classes) if program.loss.multi_label else axes
    return program.devices.abstract_batch(
        Batch(np.empty((*axes, *row), dtype), np.empty(target, np.int32), np.empty(axes, bool)),
        stacked=steps_per_call > 1,
    )
