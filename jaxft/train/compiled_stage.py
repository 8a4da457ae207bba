"""The compiled programs of a stage."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft.batch_sizes import batch_sizes
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch
from jaxft.data.augment import ENCODED_SIZE, resolve_view
from jaxft.data.device_augment import augmentation_program
from jaxft.hlo_cost import hlo_cost
from jaxft.labels import Tree
from jaxft.steps_per_execution import several_steps
from jaxft.train.eval_step import eval_step, image_eval_step
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
    params, stats = devices.abstract((shapes.params, shapes.stats))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    images = _batch_shapes(program, *_image_row(program))

    def init_optimizer(params: Tree) -> optax.OptState:
        return devices.constrain(program.transform().init(params))

    def copy(state: TrainState) -> TrainState:
        return devices.constrain(jax.tree.map(jnp.copy, state))

    def compiled(function: Any, steps_per_call: int) -> Any:
        counts = {program.sizes.rows}
        if program.epoch_length(0) == program.steps_per_epoch:  # the stage reaches a last batch
            counts.add(program.sizes.last_rows)
        programs = {}
        for rows in sorted(counts, reverse=True):
            arguments = step_shapes(program, shapes, rows=rows, steps_per_call=steps_per_call)
            if prefix.train and prefix.on_devices:
                batch = _batch_shapes(program, *_INDEX, rows=rows, steps_per_call=steps_per_call)
                features = _device_features(program, "train")
                arguments = (*arguments[:2], batch, *arguments[3:], features)
            programs[rows] = devices.lower(function, *arguments).compile()
        full = program.sizes.rows
        return programs[full] if len(programs) == 1 else ByRows(programs, full)

    step = norms = score = None
    if not stage.linear_probe:
        function = _from_devices(program, program.train_step())
        if steps_per_call > 1:
            function = several_steps(function, devices)
        step = compiled(jax.jit(function, donate_argnums=0), steps_per_call)
    if stage.auto_rgn:
        measure = _from_devices(program, program.gradient_norms(program.tensor_labels()))
        norms = compiled(jax.jit(measure), 1)
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
        devices.lower(jax.jit(copy), step_shapes(program, shapes)[0]).compile(),
        step,
        norms,
        through,
        score,
        _step_flops(step, stage.accumulate),
        sum(map(flops, through.values())),
    )


def step_shapes(
    program: StageProgram, shapes: Snapshot, *, rows: int | None = None, steps_per_call: int = 1
) -> tuple[Any, ...]:
    """Returns the shapes of the arguments of a stage's step, for arrays of these shapes.

    They are `(state, frozen, batch, number, start)`, as for `StageProgram.train_step`. With
    `steps_per_call` above 1, batches are stacked and their number follows them.

    Args:
      program: the stage.
      shapes: arrays at its start.
      rows: rows of a batch; by default those of a full batch.
      steps_per_call: number of batches.
    """
    state, frozen = program.devices.abstract(program.state(shapes))
    row = _training_row(program)
    batch = _batch_shapes(program, *row, rows=rows, steps_per_call=steps_per_call)
    numbers = [jax.ShapeDtypeStruct((), jnp.int32)] * (2 if steps_per_call > 1 else 1)
    anchor = program.devices.abstract(shapes.params) if program.plan.stage.anchor else None
    return state, frozen, batch, *numbers, anchor


def compile_augmentation(program: StageProgram) -> Any | None:
    """Compiles the augmentation of a batch on the devices; None if they have none to apply."""
    devices, view = program.devices, resolve_view(program.settings.augment)
    if not program.recipe.augment_on_device or program.prefix.train or not view.runs_on_device:
        return None
    images: Any = _batch_shapes(program, *_image_row(program)).image
    encoded = jax.ShapeDtypeStruct((images.shape[0], ENCODED_SIZE), jnp.float32)
    function = augmentation_program(view, images.ndim, images.sharding)
    return devices.lower(function, images, devices.abstract_batch(encoded)).compile()


def compile_image_evaluation(program: StageProgram, shapes: Snapshot, images: int) -> Any:
    """Compiles the evaluation of a stage that does not cache the features of validation images.

    Args:
      program: the stage.
      shapes: arrays at its start.
      images: number of validation images.
    """
    recipe, devices = program.recipe, program.devices
    sizes = batch_sizes(program.model, devices, images, recipe.batch_size)
    steps_per_call = recipe.steps_per_execution
    batch = _batch_shapes(
        program, *_image_row(program), rows=sizes.rows, steps_per_call=steps_per_call
    )
    count = (jax.ShapeDtypeStruct((), jnp.int32),) if steps_per_call > 1 else ()
    step = image_eval_step(recipe, program.model, sizes, program.loss.function)
    weights = devices.abstract((shapes.params, shapes.stats))
    return devices.lower(step, *weights, batch, *count).compile()


def _step_flops(step: Any, accumulate: int) -> float:
    if not step:
        return 0.0
    # XLA counts the body of a loop once.
    return hlo_cost(step).flops if accumulate > 1 else flops(step)


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
