"""A stage bound to the run's network, images and devices: all that its compilation needs.

`build_programs` builds and checks the programs of a run's stages.
`jaxft.train.compiled_stage.compile_stage` compiles one.
"""

import dataclasses
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import jax
import numpy as np
import optax

from jaxft import batch_sizes, data, example_function, losses, stage_plan
from jaxft.batch_sizes import BatchSizes, check_single_image
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Source, Splits
from jaxft.data.augment import check_view
from jaxft.data.class_balance import class_weights
from jaxft.data.source import is_multi_label, pixel_type
from jaxft.devices import Devices
from jaxft.errors import DataError, ModelError, PatternError, RecipeError
from jaxft.labels import FROZEN, Tree, partition, paths, unflatten
from jaxft.linear_head_check import check_linear_head
from jaxft.matmul_precision import with_precision
from jaxft.models import Model, NormMode
from jaxft.models.norm_modes import norm_modes
from jaxft.optim.transform import multi_transform
from jaxft.recipe import Recipe, StageSettings
from jaxft.stage_plan import StagePlan
from jaxft.stages import Stage
from jaxft.train import train_step
from jaxft.train.frozen_prefix import FrozenPrefix, frozen_prefix, with_cuts_and_taps
from jaxft.train.loss import Loss
from jaxft.train.metrics import GradientNorms, StepRecord
from jaxft.train.train_step import StepConfig, TrainState


@dataclass(frozen=True)
class StageProgram:
    """A stage bound to network, images and devices, with every default filled in.

    Attributes:
      index: index of the stage in its run.
      plan: the stage applied to the network's parameters.
      recipe: the run's recipe.
      settings: the recipe's settings after the stage's overrides.
      model: the network.
      devices: where the stage runs.
      norms: mode of each norm layer.
      loss: loss of the steps; of a linear probe, the cross entropy.
      steps_per_epoch: batches per epoch; with `drop_last`, whole batches only.
      sizes: number of examples and of array rows of a full batch and of an epoch's last batch.
        `BatchSizes` defines `batch_size`, `rows`, `last_rows` and `examples`.
      prefix: the leading blocks that the stage leaves unchanged; empty before `with_prefixes`.
      pixels: dtype of the images, uint8 or float32.
    """

    index: int
    plan: StagePlan
    recipe: Recipe
    settings: StageSettings
    model: Model
    devices: Devices
    norms: Mapping[str, NormMode]
    loss: Loss
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
        """Number of epochs, if nothing ends the stage earlier; the last may be incomplete."""
        return -(-self.steps // self.steps_per_epoch)

    def epoch_length(self, epoch: int) -> int:
        """Returns the number of steps of an epoch; `epoch` counts from 0."""
        return min(self.steps_per_epoch, self.steps - epoch * self.steps_per_epoch)

    def steps_of_one_shape(self, epoch: int, position: int) -> int:
        """Returns the number of next steps whose batches have the same shape.

        The last batch of an epoch may have another shape than the others.

        Args:
          epoch: index of the epoch.
          position: number of steps completed in it.
        """
        remaining = self.epoch_length(epoch) - position
        before_last_batch = self.steps_per_epoch - 1 - position
        if self.sizes.last_rows == self.sizes.rows or before_last_batch == 0:
            return remaining
        return min(remaining, before_last_batch)

    def transform(self) -> optax.GradientTransformationExtraArgs:
        """Returns the stage's optimizer.

        That of a linear probe trains nothing and only holds state parked for later stages.
        """
        if self.plan.stage.linear_probe:
            return multi_transform({}, jax.tree.map(lambda _: FROZEN, self.plan.labels))
        return self.plan.transform(self.recipe.optimizer, steps_per_epoch=self.steps_per_epoch)

    def fitting_memory(self) -> AbstractContextManager[None]:
        """Returns a context in which XLA's out-of-memory error becomes a RecipeError."""
        return batch_sizes.fitting_memory(
            self.plan.stage, self.recipe, self.settings.batch_size, self.model
        )

    def batches(
        self,
        source: Source,
        *,
        stop_epoch: int,
        first_epoch: int = 0,
        first_step: int = 0,
        features: Callable[[int], np.ndarray] | None = None,
    ) -> Generator[Batch, None, None]:
        """Yields the stage's training batches, epoch by epoch.

        Args:
          source: the training images.
          stop_epoch: index of the epoch after the last one.
          first_epoch, first_step: the first batch, by the index of its epoch and in the epoch.
          features: returns the features [n ...] of all images for a view; the batches then hold
            these instead of images.
        """
        recipe, settings = self.recipe, self.settings
        return data.train_batches(
            source,
            data.BatchConfig(
                preprocessing=recipe.preprocessing,
                augment=settings.augment,
                batch_size=settings.batch_size,
                seed=recipe.seed,
                stage=self.index,
                drop_last=recipe.drop_last,
                balanced=settings.balance == "sampling",
                num_views=settings.num_views,
                augment_on_device=recipe.augment_on_device,
                rows=self.sizes.rows,
                last_rows=self.sizes.last_rows,
                shard=self.devices.shard,
            ),
            epochs=stop_epoch,
            first_epoch=first_epoch,
            first_step=first_step,
            workers=recipe.workers,
            features=features,
        )

    def state(self, snapshot: Snapshot) -> tuple[TrainState, Tree]:
        """Splits arrays into the state that steps change and the frozen parameters.

        Copies nothing: the average starts as the same arrays as `trainable` and `stats`. Before the
        first step, which donates its state, the caller copies it (`CompiledStage.copy`).
        """
        trainable, frozen = partition(snapshot.params, self.plan.labels)
        ema = self.plan.stage.averaging
        average = ema.start(trainable, snapshot.stats) if ema else None
        return TrainState(trainable, snapshot.stats, snapshot.opt_state, average), frozen

    def train_step(
        self, *, keep_gradients: bool = False
    ) -> Callable[..., tuple[TrainState, StepRecord]]:
        """Returns the step `(state, frozen, batch, number, start=None) -> (state, record)`.

        `number` is the global step, from which the step derives its random key. `start` holds the
        parameters that an anchor pulls to.

        Args:
          keep_gradients: whether the record holds the gradients.
        """
        stage, recipe = self.plan.stage, self.recipe
        config = StepConfig(
            model=self.model,
            transform=self.transform(),
            preprocessing=recipe.preprocessing,
            norms=self.norms,
            loss=self.loss,
            metrics=recipe.metrics,
            labels=self.plan.labels,
            anchor=stage.anchor,
            clip_value=stage.clip_value,
            clip_norm=stage.clip_norm,
            accumulate=stage.accumulate,
            batch_size=self.settings.batch_size,
            examples=self.sizes.examples,
            ema=stage.averaging,
            skip_nonfinite=recipe.on_nonfinite == "skip",
            replicas=_replicas(recipe, self.devices),
            devices=self.devices,
            kernel_dtype=None if recipe.lora else recipe.dtype,  # adapters are merged before
            keep_gradients=keep_gradients,
            # With cached features the batches hold these instead of images.
            first=self.prefix.first if self.prefix.train else None,
            remat=recipe.remat,
        )
        step = train_step.train_step(config)

        def numbered_step(
            state: TrainState, frozen: Tree, batch: Batch, number: jax.Array, start: Tree = None
        ) -> tuple[TrainState, StepRecord]:
            key = jax.random.fold_in(jax.random.key(recipe.seed), number)
            return step(state, frozen, batch, key, start)

        return with_precision(numbered_step, recipe.matmul_precision)

    def gradient_norms(self, labels: Tree) -> Callable[..., GradientNorms]:
        """Returns a function of a step's arguments: norms of gradients and weights, by `labels`.

        It takes no step and donates no state.
        """
        return train_step.gradient_norms(self.train_step(keep_gradients=True), labels)

    def tensor_labels(self) -> Tree:
        """Returns the label tree in which each parameter that trains has its path as label."""
        labels = self.plan.labels
        pairs = zip(paths(labels), jax.tree.leaves(labels), strict=True)
        return unflatten(labels, [FROZEN if label == FROZEN else path for path, label in pairs])


def build_program(
    index: int,
    plan: StagePlan,
    recipe: Recipe,
    model: Model,
    source: Source,
    devices: Devices,
    shapes: tuple[Tree, Tree],
) -> StageProgram:
    """Returns the program of a stage, without its frozen prefix.

    Args:
      index: index of the stage in its run.
      plan: the stage applied to the network's parameters.
      recipe: the run's recipe.
      model: the network.
      source: the training images.
      devices: where the stage runs.
      shapes: parameters and statistics, or their shapes.

    Raises:
      JaxftError: the stage does not fit the network or the images; `build_programs` adds its name.
    """
    stage, settings = plan.stage, recipe.settings(plan.stage)
    image_size = recipe.preprocessing.image_size
    check_view(source, settings.augment)
    norms = norm_modes(*shapes, plan.labels, stage.norm_choices)
    losses.check_output(settings.loss, model.num_classes)
    weights = stage.class_weights
    if weights is None and settings.balance == "loss":
        weights = class_weights(source)
    if weights is not None and len(weights) != len(source.classes):
        raise RecipeError(
            f"it has {len(weights)} class_weights, and there are {len(source.classes)} classes: "
            f"{', '.join(source.classes)}."
        )
    loss = Loss(
        function="cross_entropy" if stage.linear_probe else settings.loss,
        label_smoothing=settings.label_smoothing, class_weights=weights,
        reduction=recipe.reduction, random_erasing=settings.random_erasing,
        mixup=settings.mixup, cutmix=settings.cutmix, multi_label=is_multi_label(source),
    )  # fmt: skip
    size, drop_last = settings.batch_size, recipe.drop_last
    steps = data.steps_per_epoch(source, size, drop_last=drop_last)
    sizes = batch_sizes.batch_sizes(model, devices, len(source), size, drop_last=drop_last)
    if stage.linear_probe:
        check_linear_head(plan, model, shapes, image_size)
    else:
        check_single_image(
            model, shapes, norms, sizes,
            image_size=image_size, accumulate=stage.accumulate, replicas=_replicas(recipe, devices),
            reaches_last=stage.length(steps) >= steps,  # the epoch's last batch may be smaller
        )  # fmt: skip
    return StageProgram(
        index=index, plan=plan, recipe=recipe, settings=settings, model=model, devices=devices,
        norms=norms, loss=loss, steps_per_epoch=steps, sizes=sizes, pixels=pixel_type(source).name,
    )  # fmt: skip


def build_programs(
    recipe: Recipe, model: Model, splits: Splits, devices: Devices, shapes: tuple[Tree, Tree]
) -> tuple[StageProgram, ...]:
    """Returns the programs of the recipe's stages, with their frozen prefixes.

    Args:
      recipe: the run's recipe.
      model: the network.
      splits: training and validation images.
      devices: where the run runs.
      shapes: parameters and statistics, or their shapes.

    Raises:
      JaxftError: a stage does not fit the network or the images.
    """
    for name in recipe.metrics:
        example_function.check(name, "a metric", model.num_classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `StagePlan.remarks` holds them; the console prints those
        plans = stage_plan.plan(recipe.stages, shapes[0])
    programs = []
    for index, plan in enumerate(plans):
        with _naming(plan.stage):
            program = build_program(index, plan, recipe, model, splits.train, devices, shapes)
        programs.append(program)
    return with_prefixes(programs, shapes, images=(len(splits.train), len(splits.val)))


def with_prefixes(
    programs: Sequence[StageProgram], shapes: tuple[Tree, Tree], *, images: tuple[int, int]
) -> tuple[StageProgram, ...]:
    """Returns the programs of a run with their frozen prefixes.

    Args:
      programs: the stages in their order.
      shapes: parameters and statistics, or their shapes.
      images: number of training and validation images.
    """
    prefixes = [
        frozen_prefix(
            program.plan, program.recipe, program.settings, program.model, program.norms, shapes,
            devices=program.devices, images=images, epochs=program.epochs,
        )
        for program in programs
    ]  # fmt: skip
    pairs = zip(programs, with_cuts_and_taps(prefixes), strict=True)
    return tuple(dataclasses.replace(program, prefix=prefix) for program, prefix in pairs)


def _replicas(recipe: Recipe, devices: Devices) -> int:
    return {"global": 1, "slice": devices.slices, "replica": len(devices)}[recipe.statistics]


@contextmanager
def _naming(stage: Stage) -> Iterator[None]:
    """Puts the name of the stage before the message of an error."""
    try:
        yield
    except (DataError, ModelError, PatternError, RecipeError) as error:
        raise type(error)(f"stage {stage.name!r}: {error}") from error
