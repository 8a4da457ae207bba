"""The training step of a stage: one function from a batch to the next state."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxft.anchor import Anchor
from jaxft.data import Batch, Preprocessing
from jaxft.devices import Devices
from jaxft.ema import EMA, Average
from jaxft.labels import FROZEN, Tree, combine, paths
from jaxft.models import Model, Norms
from jaxft.models.batch_norm import STATISTICS
from jaxft.models.norm_modes import layer
from jaxft.optim import gradients
from jaxft.optim.schedule_free import evaluation_params
from jaxft.optim.transform import pass_step
from jaxft.train.loss import Loss
from jaxft.train.metrics import GradientNorms, Metrics, StepRecord


class TrainState(NamedTuple):
    """Arrays that a step changes.

    Attributes:
      trainable: parameters that train; `None` where frozen.
      stats: statistics of norm layers.
      opt_state: state of the optimizer.
      average: average of `(trainable, stats)` over the steps, if the stage has an `ema`.
    """

    trainable: Tree
    stats: Tree
    opt_state: optax.OptState
    average: Average | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class StepConfig:
    """Everything that a training step is compiled for.

    Attributes:
      model: the network.
      transform: the stage's optimizer, of the trainable half.
      preprocessing: normalises the images.
      norms: mode of the norm layers.
      loss: turns a batch into a loss.
      metrics: functions of the user that the record reports, see `jaxft.example_function`.
      labels: label tree by which the record groups gradient and update norms; None: no groups.
      anchor: penalty that pulls the weights towards the starting weights.
      clip_value: largest absolute value of each element of the gradients.
      clip_norm: largest norm of the gradients, after `clip_value`.
      accumulate: number of parts of consecutive rows that a batch is processed in. Norm layers see
        one part at a time, as in a PyTorch loop.
      batch_size: examples of a full batch, where its arrays have more rows to fill the devices. The
        other rows belong to no part, so that parts do not depend on the number of devices.
      examples: for a network that takes no mask, the number of examples by the number of rows of a
        batch's arrays. The network receives only these rows, and the last part may be smaller.
      ema: average of the weights; None: no average.
      skip_nonfinite: if True, a step that is not finite only advances the schedules, and its record
        is zero. If False, it is applied, and `StepRecord.finite` is False.
      replicas: see `Model.apply`.
      devices: where the state lies before and after the step.
      kernel_dtype: type in which the network convolves; see `Devices.gather_params`.
      keep_gradients: the record holds the gradients.
      first: first block to run, if batches hold features of the blocks before it; None: images.
      remat: recompute each block in the backward pass to save memory.
    """

    model: Model
    transform: optax.GradientTransformation
    preprocessing: Preprocessing
    norms: Norms
    loss: Loss = Loss()
    metrics: Sequence[str] = ()
    labels: Tree = None
    anchor: Anchor | None = None
    clip_value: float | None = None
    clip_norm: float | None = None
    accumulate: int = 1
    batch_size: int | None = None
    examples: Mapping[int, int] | None = None
    ema: EMA | None = None
    skip_nonfinite: bool = False
    replicas: int = 1
    devices: Devices | None = None
    kernel_dtype: str | None = None
    keep_gradients: bool = False
    first: str | None = None
    remat: bool = False


def train_step(config: StepConfig) -> Callable[..., tuple[TrainState, StepRecord]]:
    """Returns the jitted step `(state, frozen, batch, key, start=None) -> (state, record)`.

    Only the trainable half has gradients, so that the compiled step has no backward pass through
    the blocks before the first one that trains. The state is donated: its buffers become the next
    state's.

    `key` draws dropout, random erasing and mixing. `start` holds the parameters that
    `config.anchor` pulls towards.

    The record's `loss` is the mean loss times the number of rows, without the anchor's penalty. Its
    `correct` and the user's metrics take each image's own target, whichever image is mixed into it.
    """
    model, criterion = config.model, config.loss
    groups = [label for label in jax.tree.leaves(config.labels) if label != FROZEN]

    def step(
        state: TrainState, frozen: Tree, batch: Batch, key: jax.Array, start: Tree = None
    ) -> tuple[TrainState, StepRecord]:
        # Augment.
        images = batch.image
        if criterion.changes_images:
            images = config.preprocessing.normalize(images)
        images, targets = criterion.erase_and_mix(
            images, batch.target, batch.mask, model.num_classes, key
        )
        weight = jnp.sum(criterion.weights(targets), where=batch.mask)
        rows = _Rows(images, targets, batch.target, batch.mask, key)
        # Gradient.
        grads, stats, metrics = _gradient(config, state, frozen, rows, weight)
        # Penalty.
        if config.anchor:
            grads = config.anchor.pull(grads, state.trainable, start, model.head)
        raw_grads = grads if config.keep_gradients else None
        grad_norms, total_norm = gradients.group_norms(grads, groups), optax.tree.norm(grads)
        # Clip.
        if config.clip_value:
            grads = gradients.clip_value(grads, config.clip_value)
        if config.clip_norm:
            grads, _ = gradients.clip(grads, config.clip_norm)
        # Update.
        updates, opt_state = config.transform.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        update_norms = gradients.group_norms(updates, groups)
        finite = gradients.all_finite(
            [metrics.loss, total_norm, update_norms, _updated_stats(stats, config.norms)]
        )
        # Average.
        average = state.average
        if config.ema:
            assert average is not None
            evaluated = evaluation_params(opt_state, trainable)
            average = config.ema.after_step(average, evaluated, stats)
        new = TrainState(trainable, stats, opt_state, average)
        metrics = metrics._replace(loss=metrics.loss * metrics.examples)
        record = StepRecord(metrics, grad_norms, update_norms, finite, raw_grads, weight)
        # Skip.
        if config.skip_nonfinite:
            old = state._replace(opt_state=pass_step(state.opt_state))
            zeros = jax.tree.map(jnp.zeros_like, record)
            new, record = gradients.select(finite, (new, record), (old, zeros))
        return config.devices.constrain((new, record)) if config.devices else (new, record)

    return jax.jit(step, donate_argnums=0)


def gradient_norms(
    step: Callable[..., tuple[TrainState, StepRecord]], labels: Tree
) -> Callable[..., GradientNorms]:
    """Returns a function of a step's arguments that takes no step and donates no state.

    It returns the norms of a batch's gradients and of the weights that train, by `labels`. The
    gradients' norms are NaN where the loss or any gradient is not finite.

    Args:
      step: a step built with `keep_gradients`.
      labels: label tree of the parameters.
    """
    groups = [label for label in jax.tree.leaves(labels) if label != FROZEN]

    def norms(state: TrainState, *arguments: Any) -> GradientNorms:
        record = step(state, *arguments)[1]
        # The record of a skipped step is zero, and so is its `finite`.
        grad_norms = jax.tree.map(
            lambda norm: jnp.where(record.finite, norm, jnp.nan),
            gradients.group_norms(record.gradients, groups),
        )
        return GradientNorms(grad_norms, gradients.group_norms(state.trainable, groups))

    return norms


def _gradient(
    config: StepConfig, state: TrainState, frozen: Tree, rows: "_Rows", weight: jax.Array
) -> tuple[Tree, Tree, Metrics]:
    """Returns gradients, new statistics and metrics of a batch; its `loss` is the mean."""
    model, criterion = config.model, config.loss
    apply = partial(block_by_block, model) if config.remat else model.apply
    replicas = config.devices.replicas(config.replicas) if config.devices else config.replicas

    def loss(trainable: Tree, stats: Tree, part: _Rows) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        images = part.images  # features are ready, and so are images that have been augmented
        if config.first is None and not criterion.changes_images:
            images = config.preprocessing.normalize(images)
        params = combine(trainable, frozen)
        if config.devices:
            params = config.devices.gather_params(params, config.kernel_dtype)
        logits, stats = apply(
            params,
            stats,
            images,
            norms=config.norms,
            mask=None if config.examples else part.mask,
            replicas=replicas,
            key=part.key,
            first=config.first,
        )
        losses = criterion.losses(logits, part.targets)
        # As in torch, a batch whose classes all weigh 0 has the sum 0, and no mean.
        total = jnp.where(weight == 0, 1, weight) if criterion.reduction == "sum" else weight
        share = jnp.sum(losses, where=part.mask) / total
        minimised = criterion.reduced(share, weight)
        # On CPU a fused loop of XLA may lose a NaN of the logits.
        has_nan = jnp.isnan(logits).any(where=jnp.asarray(part.mask)[:, None])
        metrics = Metrics.of_batch(logits, part.classes, part.mask, metrics=config.metrics)
        return minimised, (stats, metrics._replace(loss=jnp.where(has_nan, jnp.nan, share)))

    def gradient(stats: Tree, part: _Rows) -> tuple[tuple[Tree, Metrics], Tree]:
        grads, (stats, metrics) = jax.grad(loss, has_aux=True)(state.trainable, stats, part)
        return (grads, metrics), stats

    count = len(rows.images)
    if config.examples:
        count = config.examples[count]
        rows = rows.cut(0, count)
    size = (config.batch_size or count) // config.accumulate
    if config.accumulate == 1 or count <= size:
        (grads, metrics), stats = gradient(state.stats, rows)
        return grads, stats, metrics

    def stack(x: jax.Array, parts: int) -> jax.Array:
        if config.devices:  # a network that takes no mask takes no padding
            return config.devices.stack_parts(x, parts, size, pad=not config.examples)
        return x[: parts * size].reshape(parts, size, *x.shape[1:])

    parts, rest = rows.split(config.accumulate, size, count, stack)
    (grads, metrics), stats = gradients.accumulate_sums(gradient, state.stats, parts, rest)
    return grads, stats, metrics


class _Rows(NamedTuple):
    """A batch on its way through the network, with a leading axis of parts once it is split."""

    images: jax.Array
    targets: jax.Array
    """Targets of the loss: `[b k]`, or classes int `[b]`."""
    classes: ArrayLike
    """Targets of the metrics: the class of each image, int `[b]`, or its labels, int `[b k]`."""
    mask: ArrayLike
    key: jax.Array

    def cut(self, start: int, stop: int) -> "_Rows":
        return self._map(lambda x: x[start:stop], self.key)

    def split(
        self,
        accumulate: int,
        size: int,
        count: int,
        stack: Callable[[jax.Array, int], jax.Array],
    ) -> tuple["_Rows", "_Rows | None"]:
        """Returns the parts of `size` rows among the first `count` rows, and the rows left."""
        keys = jax.random.split(self.key, accumulate)
        whole, left = divmod(min(count, accumulate * size), size)
        rest = self.cut(whole * size, whole * size + left)._replace(key=keys[-1])
        parts = self._map(lambda x: stack(x, whole), keys[:whole])
        return parts, rest if left else None

    def _map(self, function: Callable[[jax.Array], jax.Array], key: jax.Array) -> "_Rows":
        images, targets, classes, mask = (function(jnp.asarray(x)) for x in self[:-1])
        return _Rows(images, targets, classes, mask, key)


def block_by_block(
    model: Model, params: Tree, stats: Tree, x: jax.Array, *, first: str | None = None, **how: Any
) -> tuple[jax.Array, Tree]:
    """Applies the network to its end; the backward pass keeps the input of each block alone.

    It also keeps the statistics of batch normalisation.

    Reference: Chen et al. 2016 (arXiv:1604.06174).
    """
    policy = jax.checkpoint_policies.save_only_these_names(STATISTICS)
    for block in model.blocks[model.blocks.index(first) if first else 0 :]:
        one = partial(model.apply, first=block, last=block, **how)
        x, stats = jax.checkpoint(one, policy=policy)(params, stats, x)
    return x, stats


def _updated_stats(stats: Tree, norms: Norms) -> list[jax.Array]:
    """Returns the statistics that a step moves."""
    named = zip(paths(stats), jax.tree.leaves(stats), strict=True)
    if isinstance(norms, str):
        return jax.tree.leaves(stats) if norms == "batch" else []
    return [x for path, x in named if norms[layer(path)] == "batch"]
