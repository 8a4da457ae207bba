"""A stage bound to the run's network, images and devices; compiles to `CompiledStage`."""

import dataclasses
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxft import data
from jaxft.batch_sizes import BatchSizes, batch_sizes, check_single_image, fitting_memory
from jaxft.checkpoint.contents import Snapshot
from jaxft.data import Batch, Source, Splits, steps_per_epoch
from jaxft.data.augment import check_view
from jaxft.data.class_balance import class_weights
from jaxft.data.source import pixel_type
from jaxft.distributed import Devices
from jaxft.errors import DataError, ModelError, PatternError, RecipeError
from jaxft.labels import FROZEN, Tree, leaf_labels, partition, paths, unflatten
from jaxft.models import Model, NormMode
from jaxft.models.norm_modes import norm_modes
from jaxft.optim.transform import multi_transform
from jaxft.recipe import Recipe, StageSettings
from jaxft.stage_plan import StagePlan, plan
from jaxft.stages import Stage
from jaxft.train.frozen_prefix import FrozenPrefix, connect, frozen_prefix
from jaxft.train.loss import Loss
from jaxft.train.metrics import GradientNorms, StepRecord
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
      loss: loss of its steps.
      steps_per_epoch: batches that hold every training image once.
      sizes: array shapes of these batches.
      prefix: the part of the network that the stage does not change; added by
        `with_prefixes`.
      pixels: type of the images' values, uint8 or float32.
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
    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The stage's optimizer; for a linear probe one that only carries parked state."""
        if self.plan.stage.linear_probe:
            return multi_transform({}, jax.tree.map(lambda _: FROZEN, self.plan.labels))
        return self.plan.transform(self.recipe.optimizer, steps_per_epoch=self.steps_per_epoch)

    def fitting_memory(self) -> AbstractContextManager[None]:
        """Returns the context of `jaxft.batch_sizes.fitting_memory` for this stage."""
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
            data.BatchConfig(
                preprocessing=recipe.preprocessing,
                augment=settings.augment,
                batch_size=settings.batch_size,
                seed=recipe.seed,
                stage=self.index,
                drop_last=recipe.drop_last,
                balanced=settings.balance == "sampling",
                num_views=settings.num_views,
                rows=self.sizes.rows,
                last_rows=self.sizes.last_rows,
                shard=self.devices.shard,
            ),
            epochs=epochs,
            first_epoch=first_epoch,
            first_step=first_step,
            workers=recipe.workers,
            features=features,
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
            loss=self.loss,
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

    def gradient_norms(self, labels: Tree) -> Callable[..., GradientNorms]:
        """Returns `jaxft.train.train_step.gradient_norms` of the stage's step."""
        return gradient_norms(self.train_step(keep_gradients=True), labels)

    @property
    def tensor_labels(self) -> Tree:
        """The label tree in which each parameter that trains has its path as its label."""
        labels = self.plan.labels
        named = zip(paths(labels), jax.tree.leaves(labels), strict=True)
        return unflatten(labels, [FROZEN if label == FROZEN else path for path, label in named])


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
    loss = Loss(
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
    if not stage.linear_probe:
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
        index, plan, recipe, settings, model, devices, norms, loss, steps, sizes,
        pixels=pixel_type(source).name,
    )  # fmt: skip


def open_programs(
    recipe: Recipe, model: Model, splits: Splits, devices: Devices, like: tuple[Tree, Tree]
) -> tuple[StageProgram, ...]:
    """Returns a program for each of the recipe's stages; `like` may be shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the console shows the remarks when their stage begins
        plans = plan(recipe.stages, like[0])
    for each in plans:
        if each.stage.linear_probe:
            image_size = recipe.preprocessing.image_size
            _check_linear_head(each, model, *like, image_size=image_size)
    programs = [
        stage_program(index, stage, recipe, model, splits.train, devices, like)
        for index, stage in enumerate(plans)
    ]
    return with_prefixes(programs, like, images=(len(splits.train), len(splits.val)))


def with_prefixes(
    programs: Sequence[StageProgram], like: tuple[Tree, Tree], *, images: tuple[int, int]
) -> tuple[StageProgram, ...]:
    """Returns the stages of a run with their frozen prefixes.

    Args:
      programs: the stages.
      like: parameters and statistics, or their shapes.
      images: number of training and validation images.
    """
    prefixes = [
        frozen_prefix(
            each.plan, each.recipe, each.settings, each.model, each.norms, like,
            images=images, epochs=each.epochs,
        )
        for each in programs
    ]  # fmt: skip
    connected = zip(programs, connect(prefixes), strict=True)
    return tuple(dataclasses.replace(each, prefix=prefix) for each, prefix in connected)


def _check_linear_head(
    plan: StagePlan, model: Model, params: Tree, stats: Tree, *, image_size: int
) -> None:
    """Checks that the stage trains the whole head and that the head is one linear layer.

    Args:
      plan: the stage over the network's parameters.
      model: the network.
      params, stats: parameters and statistics, or their shapes.
      image_size: side of the images in pixels.

    Raises:
      ModelError, RecipeError: it does not.
    """
    name, head = plan.stage.name, model.head
    if len(model.blocks) < 2:
        raise ModelError(
            f"stage {name!r} solves the head on the features before it, and {model.name} is one "
            "block, of which they cannot be had. Step its head instead, with a learning rate; or "
            "use jaxft.logistic_regression on features of your own."
        )
    labels = leaf_labels(params, plan.labels)
    shapes = {
        path: leaf.shape
        for path, leaf, label in zip(paths(params), jax.tree.leaves(params), labels, strict=True)
        if label != FROZEN or f"{path}.".startswith(f"{head}.")
    }
    trained = [path for path, label in zip(paths(params), labels, strict=True) if label != FROZEN]
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    features, _ = jax.eval_shape(
        partial(model.apply, norms="running", last=model.blocks[-2]), params, stats, images
    )
    kernel, bias = (*features.shape[1:], model.num_classes), (model.num_classes,)
    if features.ndim != 2 or shapes != {f"{head}.kernel": kernel, f"{head}.bias": bias}:
        raise RecipeError(
            f"stage {name!r}: a LinearProbe solves the head alone, and that must be one "
            f"linear layer: {head}.kernel [d {model.num_classes}] and {head}.bias on features "
            f"[b d]. In {model.name} features are {['b', *features.shape[1:]]}, and head and "
            f"pattern have {', '.join(f'{path} {list(x)}' for path, x in shapes.items())}."
        )
    if sorted(trained) != sorted(shapes):
        raise RecipeError(
            f"stage {name!r}: a LinearProbe solves all of the head, and the pattern "
            f"selects only {', '.join(trained)}. Write {head!r}."
        )


def _replicas(recipe: Recipe, devices: Devices) -> int:
    return len(devices) if recipe.statistics == "replica" else 1


@contextmanager
def _naming(stage: Stage) -> Iterator[None]:
    """Puts the name of the stage before the message of an error."""
    try:
        yield
    except (DataError, PatternError, RecipeError) as error:
        raise type(error)(f"stage {stage.name!r}: {error}") from error
