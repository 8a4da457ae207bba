"""A stage over this run's network, images and devices: what its compiled step depends on."""

from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from jaxft.optim.gradients import group_norms
from jaxft.optim.optimizers import multi_transform
from jaxft.recipe import Recipe
from jaxft.stage_plan import StagePlan
from jaxft.stages import Stage
from jaxft.train.batch_sizes import BatchSizes, batch_sizes
from jaxft.train.compiled_stage import flops
from jaxft.train.eval_step import eval_step
from jaxft.train.execution import one_by_one
from jaxft.train.frozen_prefix import Prefix, compile_prefix
from jaxft.train.metrics import StepRecord
from jaxft.train.norms import norm_modes
from jaxft.train.objective import Objective
from jaxft.train.single_image import check_single_image
from jaxft.train.solvable import check_solvable
from jaxft.train.train_step import StepConfig, TrainState, train_step


class Gauge(NamedTuple):
    """L2 norms by label, scalars."""

    gradients: dict[str, jax.Array]
    weights: dict[str, jax.Array]


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
        """Returns what XLA counts for a full batch."""
        return self.programs[self.full].cost_analysis()

    def memory_analysis(self) -> Any:
        """Returns the memory that a full batch takes."""
        return self.programs[self.full].memory_analysis()


class Compiled(NamedTuple):
    """The programs of a stage, compiled for its shapes."""

    fresh: Callable[[Tree], optax.OptState]
    """An optimizer's state for the parameters, as at its first step."""
    copy: Callable[[TrainState], TrainState]
    """The same in other buffers."""
    step: Any
    """`(state, frozen, batch, number, start) -> (state, record)`, see `train_step`; `number` is
    the global step. The state is donated. None, where the stage is solved. With
    `steps_per_execution` above 1, batches and records are stacked, and how many there are follows
    the batches."""
    gauge: Callable[..., Gauge] | None
    """See `Program.gauge`; by tensor, where rates are relative."""
    prefix: Mapping[str, Callable[[Tree, Tree, jax.Array], jax.Array]]
    """See `compile_prefix`; empty if nothing of it is kept."""
    score: Callable[..., Any] | None
    """See `eval_step`; of batches of what is kept, where that is."""
    flops: float
    """Of a step."""
    prefix_flops: float
    """Of the prefix on a batch."""


@dataclass(frozen=True)
class Program:
    """One stage, every default filled in.

    Attributes:
      index: of the stage in its run.
      plan: what trains.
      recipe: as it is in this stage.
      model: the network.
      devices: where it runs.
      norms: the mode of each norm layer.
      objective: what its steps minimise.
      steps_per_epoch: batches that hold every training image once.
      sizes: array shapes of these batches.
      prefix: what of the network it leaves as it is.
      pixels: type of the images' values, uint8 or float32.
    """

    index: int
    plan: StagePlan
    recipe: Recipe
    model: Model
    devices: Devices
    norms: Mapping[str, NormMode]
    objective: Objective
    steps_per_epoch: int
    sizes: BatchSizes
    prefix: Prefix = Prefix()
    pixels: str = "uint8"

    @property
    def steps(self) -> int:
        """The stage's length, if nothing ends it earlier."""
        return self.plan.stage.length(self.steps_per_epoch)

    @property
    def epochs(self) -> int:
        """Likewise; the last one may be short."""
        return -(-self.steps // self.steps_per_epoch)

    def epoch_length(self, epoch: int) -> int:
        """The steps of an epoch, counted from 0."""
        return min(self.steps_per_epoch, self.steps - epoch * self.steps_per_epoch)

    def alike(self, epoch: int, position: int) -> int:
        """Returns the number of steps that follow in an epoch whose batches have one shape."""
        left = self.epoch_length(epoch) - position
        before_last = self.steps_per_epoch - 1 - position
        is_other = self.sizes.last_rows != self.sizes.rows
        return min(left, before_last) if is_other and before_last else left

    @property
    def rows(self) -> int:
        """Rows of a full batch's arrays: in equal shares for the devices."""
        return self.sizes.rows

    @property
    def transform(self) -> optax.GradientTransformationExtraArgs:
        """The stage's optimizer; if it is solved, one that only keeps what is parked."""
        if self.plan.stage.solver:
            return multi_transform({}, jax.tree.map(lambda _: FROZEN, self.plan.labels))
        return self.plan.transform(self.recipe.optimizer, steps_per_epoch=self.steps_per_epoch)

    def batches(
        self,
        source: Source,
        *,
        epochs: int,
        first_epoch: int = 0,
        first_step: int = 0,
        kept: Callable[[int], np.ndarray] | None = None,
    ) -> Generator[Batch, None, None]:
        """What the stage trains on, of a source, up to an epoch; see `jaxft.data.train_batches`."""
        recipe = self.recipe
        return data.train_batches(
            source,
            recipe.preprocessing,
            augment=recipe.augment,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            stage=self.index,
            first_epoch=first_epoch,
            first_step=first_step,
            epochs=epochs,
            workers=recipe.workers,
            drop_last=recipe.drop_last,
            balanced=recipe.balance == "sampling",
            views=recipe.views,
            kept=kept,
            rows=self.sizes.rows,
            last_rows=self.sizes.last_rows,
            shard=self.devices.shard,
        )

    def state(self, at: Snapshot) -> tuple[TrainState, Tree]:
        """The state of its steps, and the frozen half; in the same buffers."""
        trainable, frozen = partition(at.params, self.plan.labels)
        average = (trainable, at.stats) if self.plan.stage.ema else None
        return TrainState(trainable, at.stats, at.opt_state, average), frozen

    def train_step(
        self, *, keep_gradients: bool = False
    ) -> Callable[..., tuple[TrainState, StepRecord]]:
        """The stage's step, given the number of its batch for a key; see `Compiled.step`."""
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
            batch_size=recipe.batch_size,
            examples=self.sizes.examples,
            ema=stage.ema,
            skip_nonfinite=recipe.on_nonfinite == "skip",
            replicas=len(self.devices) if recipe.statistics == "replica" else 1,
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
        """`train_step` with the first `count` of stacked batches."""
        step = self.train_step()

        def steps(
            state: TrainState,
            frozen: Tree,
            batches: Batch,
            count: jax.Array,
            number: jax.Array,
            start: Tree,
        ) -> tuple[TrainState, StepRecord]:
            def further(state: TrainState, batch: Batch, i: Any) -> tuple[TrainState, StepRecord]:
                return step(state, frozen, batch, number + i, start)

            # The loop leaves open where its outcome lies.
            return self.devices.constrain(one_by_one(further, state, batches, count))

        return steps

    def gauge(self, labels: Tree) -> Callable[..., Gauge]:
        """The norms of a batch's gradients and of the weights, with the arguments of a step.

        They are by `labels`, of what trains; those of gradients are NaN where the loss or any
        gradient is not finite. No step is taken, and the state is not donated.
        """
        step = self.train_step(keep_gradients=True)
        groups = [label for label in jax.tree.leaves(labels) if label != FROZEN]

        def gauge(state: TrainState, *batch: Any) -> Gauge:
            record = step(state, *batch)[1]
            # A step that leaves out what is not finite would tell of zeros.
            found = jax.tree.map(
                lambda norm: jnp.where(record.finite, norm, jnp.nan),
                group_norms(record.gradients, groups),
            )
            return Gauge(found, group_norms(state.trainable, groups))

        return gauge

    @property
    def same_views(self) -> bool:
        """Whether all stages of which this holds see the same of the images to train on."""
        return bool(self.plan.stage.solver) or self.recipe.augment == "none"

    @property
    def tensors(self) -> Tree:
        """The label tree in which each parameter that trains has a label of its own, its path."""
        labels = self.plan.labels
        named = zip(paths(labels), jax.tree.leaves(labels), strict=True)
        return unflatten(labels, [FROZEN if label == FROZEN else path for path, label in named])

    def compile(self, shapes: Snapshot) -> Compiled:
        """Compiles the stage for arrays of these shapes, those at its start; takes a while."""
        stage, recipe, devices = self.plan.stage, self.recipe, self.devices
        places, number = recipe.steps_per_execution, jax.ShapeDtypeStruct((), jnp.int32)

        def fresh(params: Tree) -> optax.OptState:
            return devices.constrain(self.transform.init(params))

        def copy(state: TrainState) -> TrainState:
            return devices.constrain(jax.tree.map(jnp.copy, state))

        state, frozen = devices.abstract(self.state(shapes))
        params, stats = devices.abstract((shapes.params, shapes.stats))
        side, kept = recipe.preprocessing.image_size, self.prefix
        images = self._abstract((side, side, 3), self.pixels)
        row, dtype = images.image.shape[1:], images.image.dtype
        if kept.row and kept.train:
            row, dtype = kept.row.shape, kept.row.dtype

        def compiled(function: Any, places: int, *rest: Any) -> Any:
            programs = {}
            reaches_last = self.epoch_length(0) == self.steps_per_epoch
            reached = (self.sizes.rows, *[self.sizes.last_rows] * reaches_last)
            for rows in dict.fromkeys(reached):
                batches = self._abstract(row, dtype, places, rows)
                programs[rows] = function.lower(state, frozen, batches, *rest).compile()
            return programs[self.rows] if len(programs) == 1 else ByRows(programs, self.rows)

        through: dict[str, Any] = {}
        score = None
        if kept.row and kept.val:
            like = (params, stats, images.image)
            through = compile_prefix(self.model, recipe.preprocessing, devices, kept.cuts, like)
            scoring = eval_step(self.model, recipe.preprocessing, first=kept.first, places=places)
            views = 2 if recipe.tta == "flip" else 1
            rows = self._abstract((views, *kept.row.shape), kept.row.dtype, places)
            score = scoring.lower(params, stats, rows, *[number] * (places > 1)).compile()
        start = params if stage.anchor else None
        step = None
        if not stage.solver and places == 1:
            step = compiled(jax.jit(self.train_step(), donate_argnums=0), 1, number, start)
        elif not stage.solver:
            several = jax.jit(self.train_steps(), donate_argnums=0)
            step = compiled(several, places, number, number, start)
        gauge: Callable[..., Gauge] | None = None
        if stage.relative_rates:
            gauge = compiled(jax.jit(self.gauge(self.tensors)), 1, number, start)
        return Compiled(
            jax.jit(fresh).lower(params).compile(),
            jax.jit(copy).lower(state).compile(),
            step,
            gauge,
            through,
            score,
            flops(step) * stage.accumulate if step else 0.0,  # of a loop's body XLA counts one turn
            sum(map(flops, through.values())),
        )

    def _abstract(
        self, row: tuple[int, ...], dtype: Any, places: int = 1, rows: int | None = None
    ) -> Batch:
        """The shapes of a batch of such rows, or of so many that are stacked."""
        axes = (rows or self.rows,) if places == 1 else (places, rows or self.rows)
        return self.devices.abstract_batch(
            Batch(np.empty((*axes, *row), dtype), np.empty(axes, np.int32), np.empty(axes, bool)),
            stacked=places > 1,
        )


def program(
    index: int,
    plan: StagePlan,
    recipe: Recipe,
    model: Model,
    source: Source,
    devices: Devices,
    shapes: tuple[Tree, Tree],
) -> Program:
    """The program of a stage that trains on `source`; `shapes` are of parameters and statistics.

    All of the network runs in its steps, until it is told of its prefix.

    Raises JaxftError for what of the stage does not fit the network or the images.
    """
    stage = plan.stage
    recipe = recipe.during(stage)
    with _naming(stage):
        check_view(source, recipe.augment)
    if stage.solver:
        check_solvable(plan, model, *shapes, image_size=recipe.preprocessing.image_size)
    with _naming(stage):
        norms = norm_modes(*shapes, plan.labels, stage.norm_choices)
    weights = stage.class_weights
    if weights is None and recipe.balance == "loss":
        weights = class_weights(source)
    if weights is not None and len(weights) != len(source.classes):
        raise RecipeError(
            f"stage {stage.name!r} has {len(weights)} class_weights, and there are "
            f"{len(source.classes)} classes: {', '.join(source.classes)}."
        )
    objective = Objective(
        label_smoothing=recipe.label_smoothing,
        class_weights=weights,
        reduction=recipe.reduction,
        erasing=recipe.erasing,
        mixup=recipe.mixup,
        cutmix=recipe.cutmix,
    )
    steps = steps_per_epoch(source, recipe.batch_size, drop_last=recipe.drop_last)
    sizes = batch_sizes(model, devices, len(source), recipe.batch_size, drop_last=recipe.drop_last)
    if not stage.solver:
        with _naming(stage):
            check_single_image(
                model,
                shapes,
                norms,
                sizes,
                image_size=recipe.preprocessing.image_size,
                accumulate=stage.accumulate,
                replicas=len(devices) if recipe.statistics == "replica" else 1,
                reaches_last=stage.length(steps) >= steps,
            )
    pixels = pixel_type(source).name
    return Program(
        index, plan, recipe, model, devices, norms, objective, steps, sizes, pixels=pixels
    )


@contextmanager
def _naming(stage: Stage) -> Iterator[None]:
    """Puts the name of the stage before the message of an error."""
    try:
        yield
    except (DataError, PatternError, RecipeError) as error:
        raise type(error)(f"stage {stage.name!r}: {error}") from error
