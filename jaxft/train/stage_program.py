"""A stage bound to the run's network, images and devices; compiles to `CompiledStage`."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import data
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Source, steps_per_epoch
from jaxft.data.augment import check_view
from jaxft.data.class_balance import class_weights
from jaxft.data.source import pixel_type
from jaxft.distributed import Devices
from jaxft.errors import DataError, PatternError, RecipeError
from jaxft.labels import FROZEN, Tree, partition, paths, unflatten
from jaxft.models import Model, NormMode
from jaxft.models.norm_modes import norm_modes
from jaxft.optim.transform import multi_transform
from jaxft.recipe import Recipe, StageSettings
from jaxft.stage_plan import StagePlan
from jaxft.stages import Stage
from jaxft.train.batch_sizes import BatchSizes, batch_sizes, check_single_image, fitting_memory
from jaxft.train.compiled_stage import ByRows, CompiledStage, flops, several_steps
from jaxft.train.eval_step import eval_step
from jaxft.train.frozen_prefix import FrozenPrefix, compile_prefix
from jaxft.train.metrics import GradientNorms, StepRecord
from jaxft.train.objective import Objective
from jaxft.train.train_step import StepConfig, TrainState, gradient_norms, train_step


@dataclass(frozen=True)
class StageProgram:
    """A stage bound to network, images and devices, with every default filled in.

    Attributes:
      index: index of the stage in its run.
      plan: the stage over the network's parameters.
      recipe: the run's recipe.
      settings: settings that the stage may override.
      model: the network.
      devices: where it runs.
      norms: mode of each norm layer.
      objective: loss of its steps.
      steps_per_epoch: batches that hold every training image once.
      sizes: array shapes of these batches.
      prefix: the part of the network that the stage does not change; added by
        `jaxft.train.opening.with_prefixes`.
      pixels: type of the images' values, uint8 or float32.
    """

    index: int
    plan: StagePlan
    recipe: Recipe
    settings: StageSettings
    model: Model
    devices: Devices
    norms: Mapping[str, NormMode]
    objective: Objective
    steps_per_epoch: int
    sizes: BatchSizes
    prefix: FrozenPrefix = FrozenPrefix()
    pixels: str = "uint8"

    @property
    def steps(self) -> int:
        """Number of steps, if nothing ends the stage earlier."""
        return self.plan.stage.length(self.steps_per_epoch)

    @property
    def epochs(self) -> int:
        """Number of epochs, if nothing ends the stage earlier; the last one may be short."""
        return -(-self.steps // self.steps_per_epoch)

    def epoch_length(self, epoch: int) -> int:
        """Returns the number of steps of an epoch, which is counted from 0."""
        return min(self.steps_per_epoch, self.steps - epoch * self.steps_per_epoch)

    def steps_of_one_shape(self, epoch: int, position: int) -> int:
        """Returns how many of the epoch's next steps have batches of the same shape.

        An epoch's last batch may have another shape than the others.
        """
        left = self.epoch_length(epoch) - position
        before_last = self.steps_per_epoch - 1 - position
        last_differs = self.sizes.last_rows != self.sizes.rows
        return min(left, before_last) if last_differs and before_last else left

    @property
    def rows(self) -> int:
        """Rows of a full batch's arrays: in equal shares for the devices."""
        return self.sizes.rows

    @property
    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The stage's optimizer; for a linear probe one that only carries parked state."""
        if self.plan.stage.solver:
            return multi_transform({}, jax.tree.map(lambda _: FROZEN, self.plan.labels))
        return self.plan.transform(self.recipe.optimizer, steps_per_epoch=self.steps_per_epoch)

    def fitting_memory(self) -> AbstractContextManager[None]:
        """Returns the context of `jaxft.train.batch_sizes.fitting_memory` for this stage."""
        return fitting_memory(self.plan.stage, self.recipe, self.settings.batch_size, self.model)

    def batches(
        self,
        source: Source,
        *,
        epochs: int,
        first_epoch: int = 0,
        first_step: int = 0,
        features: Callable[[int], np.ndarray] | None = None,
    ) -> Generator[Batch, None, None]:
        """Yields the stage's training batches up to an epoch; see `jaxft.data.train_batches`."""
        recipe, settings = self.recipe, self.settings
        return data.train_batches(
            source,
            recipe.preprocessing,
            augment=settings.augment,
            batch_size=settings.batch_size,
            seed=recipe.seed,
            stage=self.index,
            first_epoch=first_epoch,
            first_step=first_step,
            epochs=epochs,
            workers=recipe.workers,
            drop_last=recipe.drop_last,
            balanced=settings.balance == "sampling",
            num_views=settings.num_views,
            features=features,
            rows=self.sizes.rows,
            last_rows=self.sizes.last_rows,
            shard=self.devices.shard,
        )

    def state(self, snapshot: Snapshot) -> tuple[TrainState, Tree]:
        """Splits a snapshot into the state of the steps and the frozen half, without copying."""
        trainable, frozen = partition(snapshot.params, self.plan.labels)
        average = (trainable, snapshot.stats) if self.plan.stage.ema else None
        return TrainState(trainable, snapshot.stats, snapshot.opt_state, average), frozen

    def train_step(
        self, *, keep_gradients: bool = False
    ) -> Callable[..., tuple[TrainState, StepRecord]]:
        """Returns the stage's step, whose random key depends on the number of the step.

        See `CompiledStage.step` for its arguments.
        """
        stage, recipe = self.plan.stage, self.recipe
        config = StepConfig(
            model=self.model,
            transform=self.transform,
            preprocessing=recipe.preprocessing,
            norms=self.norms,
            objective=self.objective,
            labels=self.plan.labels,
            anchor=stage.anchor,
            clip_norm=stage.clip_norm,
            accumulate=stage.accumulate,
            batch_size=self.settings.batch_size,
            examples=self.sizes.examples,
            ema=stage.ema,
            skip_nonfinite=recipe.on_nonfinite == "skip",
            replicas=_replicas(recipe, self.devices),
            devices=self.devices,
            keep_gradients=keep_gradients,
            first=self.prefix.first if self.prefix.train else None,
            remat=recipe.remat,
        )
        step = train_step(config)

        def numbered(
            state: TrainState, frozen: Tree, batch: Batch, number: jax.Array, start: Tree = None
        ) -> tuple[TrainState, StepRecord]:
            key = jax.random.fold_in(jax.random.key(recipe.seed), number)
            return step(state, frozen, batch, key, start)

        return numbered

    def train_steps(self) -> Callable[..., tuple[TrainState, StepRecord]]:
        """Returns a function that takes `count` steps over batches stacked along a new axis."""
        return several_steps(self.train_step(), self.devices)

    def gradient_norms(self, labels: Tree) -> Callable[..., GradientNorms]:
        """Returns `jaxft.train.train_step.gradient_norms` of the stage's step."""
        return gradient_norms(self.train_step(keep_gradients=True), labels)

    @property
    def tensor_labels(self) -> Tree:
        """The label tree in which each parameter that trains has its path as its label."""
        labels = self.plan.labels
        named = zip(paths(labels), jax.tree.leaves(labels), strict=True)
        return unflatten(labels, [FROZEN if label == FROZEN else path for path, label in named])

    def compile(self, shapes: Snapshot) -> CompiledStage:
        """Compiles the programs of the stage for arrays of these shapes at its start."""
        stage, recipe, devices = self.plan.stage, self.recipe, self.devices
        steps_per_call, number = recipe.steps_per_execution, jax.ShapeDtypeStruct((), jnp.int32)

        def init_optimizer(params: Tree) -> optax.OptState:
            return devices.constrain(self.transform.init(params))

        def copy(state: TrainState) -> TrainState:
            return devices.constrain(jax.tree.map(jnp.copy, state))

        state, frozen = devices.abstract(self.state(shapes))
        params, stats = devices.abstract((shapes.params, shapes.stats))
        side, prefix = recipe.preprocessing.image_size, self.prefix
        images = self._abstract((side, side, 3), self.pixels)
        row, dtype = images.image.shape[1:], images.image.dtype
        if prefix.row and prefix.train:
            row, dtype = prefix.row.shape, prefix.row.dtype

        def compiled(function: Any, steps_per_call: int, *rest: Any) -> Any:
            programs, shapes_of_rows = {}, {self.sizes.rows}
            if self.epoch_length(0) == self.steps_per_epoch:  # the stage reaches a last batch
                shapes_of_rows.add(self.sizes.last_rows)
            for rows in sorted(shapes_of_rows, reverse=True):
                batches = self._abstract(row, dtype, steps_per_call, rows)
                programs[rows] = function.lower(state, frozen, batches, *rest).compile()
            return programs[self.rows] if len(programs) == 1 else ByRows(programs, self.rows)

        through: dict[str, Any] = {}
        score = None
        if prefix.row and prefix.val:
            like = (params, stats, images.image)
            through = compile_prefix(self.model, recipe.preprocessing, devices, prefix.cuts, like)
            scoring = eval_step(
                self.model,
                recipe.preprocessing,
                first=prefix.first,
                steps_per_call=steps_per_call,
            )
            views = 2 if recipe.tta == "flip" else 1
            rows = self._abstract((views, *prefix.row.shape), prefix.row.dtype, steps_per_call)
            count = (number,) if steps_per_call > 1 else ()
            score = scoring.lower(params, stats, rows, *count).compile()
        start = params if stage.anchor else None
        step = None
        if not stage.solver and steps_per_call == 1:
            step = compiled(jax.jit(self.train_step(), donate_argnums=0), 1, number, start)
        elif not stage.solver:
            several = jax.jit(self.train_steps(), donate_argnums=0)
            step = compiled(several, steps_per_call, number, number, start)
        norms: Callable[..., GradientNorms] | None = None
        if stage.auto_rgn:
            norms = compiled(jax.jit(self.gradient_norms(self.tensor_labels)), 1, number, start)
        return CompiledStage(
            jax.jit(init_optimizer).lower(params).compile(),
            jax.jit(copy).lower(state).compile(),
            step,
            norms,
            through,
            score,
            flops(step) * stage.accumulate if step else 0.0,  # XLA counts a loop's body once
            sum(map(flops, through.values())),
        )

    def _abstract(
        self, row: tuple[int, ...], dtype: Any, steps_per_call: int = 1, rows: int | None = None
    ) -> Batch:
        """Returns the shapes of a batch of such rows, or of several stacked batches."""
        axes: tuple[int, ...] = (rows or self.rows,)
        if steps_per_call > 1:
            axes = (steps_per_call, *axes)
        return self.devices.abstract_batch(
            Batch(np.empty((*axes, *row), dtype), np.empty(axes, np.int32), np.empty(axes, bool)),
            stacked=steps_per_call > 1,
        )


def stage_program(
    index: int,
    plan: StagePlan,
    recipe: Recipe,
    model: Model,
    source: Source,
    devices: Devices,
    shapes: tuple[Tree, Tree],
) -> StageProgram:
    """Returns the program of a stage that trains on `source`, without its frozen prefix.

    `shapes` are the shapes of parameters and statistics.

    Raises:
      JaxftError: the stage does not fit the network or the images.
    """
    stage, settings = plan.stage, recipe.settings(plan.stage)
    image_size = recipe.preprocessing.image_size
    with _naming(stage):
        check_view(source, settings.augment)
        norms = norm_modes(*shapes, plan.labels, stage.norm_choices)
    weights = stage.class_weights
    if weights is None and settings.balance == "loss":
        weights = class_weights(source)
    if weights is not None and len(weights) != len(source.classes):
        raise RecipeError(
            f"stage {stage.name!r} has {len(weights)} class_weights, and there are "
            f"{len(source.classes)} classes: {', '.join(source.classes)}."
        )
    objective = Objective(
        label_smoothing=settings.label_smoothing,
        class_weights=weights,
        reduction=recipe.reduction,
        random_erasing=settings.random_erasing,
        mixup=settings.mixup,
        cutmix=settings.cutmix,
    )
    size, drop_last = settings.batch_size, recipe.drop_last
    steps = steps_per_epoch(source, size, drop_last=drop_last)
    sizes = batch_sizes(model, devices, len(source), size, drop_last=drop_last)
    if not stage.solver:
        with _naming(stage):
            check_single_image(
                model,
                shapes,
                norms,
                sizes,
                image_size=image_size,
                accumulate=stage.accumulate,
                replicas=_replicas(recipe, devices),
                reaches_last=stage.length(steps) >= steps,
            )
    return StageProgram(
        index, plan, recipe, settings, model, devices, norms, objective, steps, sizes,
        pixels=pixel_type(source).name,
    )  # fmt: skip


def _replicas(recipe: Recipe, devices: Devices) -> int:
    return len(devices) if recipe.statistics == "replica" else 1


@contextmanager
def _naming(stage: Stage) -> Iterator[None]:
    """Puts the name of the stage before the message of an error."""
    try:
        yield
    except (DataError, PatternError, RecipeError) as error:
        raise type(error)(f"stage {stage.name!r}: {error}") from error
