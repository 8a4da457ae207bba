"""The training step: gradients of the trainable half, through one multi_transform, donated."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxft.data import Batch, Preprocessing
from jaxft.distributed import Devices
from jaxft.l2_sp import Anchor
from jaxft.labels import FROZEN, Tree, combine, paths
from jaxft.models import Model, Norms
from jaxft.optim import gradients
from jaxft.optim.optimizers import pass_step
from jaxft.train.metrics import Metrics, StepRecord
from jaxft.train.norms import layer
from jaxft.train.objective import Objective
from jaxft.train.remat import block_by_block


class TrainState(NamedTuple):
    """What a step changes: the trainable half (`None` where frozen), statistics, optimizer."""

    trainable: Tree
    stats: Tree
    opt_state: optax.OptState
    average: tuple[Tree, Tree] | None = None
    """Of `(trainable, stats)` over the steps, where the stage has an `ema`."""


def train_step(
    model: Model,
    transform: optax.GradientTransformation,
    preprocessing: Preprocessing,
    norms: Norms,
    objective: Objective = Objective(),
    *,
    labels: Tree = None,
    anchor: Anchor | None = None,
    clip_norm: float | None = None,
    accumulate: int = 1,
    batch_size: int | None = None,
    examples: Mapping[int, int] | None = None,
    ema: float | None = None,
    skip_nonfinite: bool = False,
    replicas: int = 1,
    devices: Devices | None = None,
    keep_gradients: bool = False,
    first: str | None = None,
    remat: bool = False,
) -> Callable[..., tuple[TrainState, StepRecord]]:
    """The jitted step of a stage: `(state, frozen, batch, key, start=None) -> (state, record)`.

    The loss is the mean cross entropy over the batch's actual rows, or as `objective` has it.
    Gradients are taken of the trainable half alone, so that the compiled step has no backward pass
    through what lies before it. The state is donated: its buffers are the next state's. `key`
    draws dropout, erasing and mixing; `start` are the parameters that an `anchor` holds to.

    The record's `loss` is the mean loss, times the rows, without the anchor's penalty; its
    `correct` are hits of each image's own class, whatever is mixed into it.

    labels: the stage's, to tell norms by group; none: without norms.
    accumulate: the batch is worked through in so many parts of consecutive rows, by which it must
      be divisible; norm layers see one part at a time, as in torch's loops.
    batch_size: of a full batch, where its arrays have more rows, to fill the devices; these are in
      no part, or what a part is would depend on the number of devices.
    examples: for a network that takes no mask, the number of examples in a batch of so many rows.
      The network never sees the others, and the last part of a batch may be smaller.
    skip_nonfinite: a step whose loss or gradients are not finite changes nothing and its images
      are not in the record; else it is taken, and `finite` tells.
    replicas: see `Model.apply`.
    devices: where the state belongs, and stays.
    keep_gradients: the record has them, for who wants to look.
    first: the block to begin with, where a batch has what those before it make of the images.
    remat: the backward pass computes each block again from what came into it, for its memory.
    """
    apply = partial(block_by_block, model) if remat else model.apply
    groups = [label for label in jax.tree.leaves(labels) if label != FROZEN]

    def loss(
        trainable: Tree, stats: Tree, frozen: Tree, part: _Rows, total: jax.Array
    ) -> tuple[jax.Array, tuple[Tree, Metrics]]:
        logits, stats = apply(
            combine(trainable, frozen),
            stats,
            part.images,
            norms=norms,
            mask=None if examples else part.mask,
            replicas=replicas,
            key=part.key,
            first=first,
        )
        losses = objective.losses(logits, part.targets)
        # As in torch, a batch whose classes all weigh 0 has the sum 0, and no mean.
        weight = jnp.where(total == 0, 1, total) if objective.reduction == "sum" else total
        share = jnp.sum(losses, where=part.mask) / weight
        minimised = objective.reduced(share, total)
        # Within a fusion XLA may drop NaN from the loss on CPU.
        lost = jnp.isnan(logits).any(where=jnp.asarray(part.mask)[:, None])
        told = jnp.where(lost, jnp.nan, share)
        metrics = Metrics.of_batch(logits, part.target, part.mask)
        return minimised, (stats, metrics._replace(loss=told))

    def backward(
        state: TrainState, frozen: Tree, batch: Batch, key: jax.Array
    ) -> tuple[Tree, Tree, Metrics, jax.Array]:
        """Gradients, new statistics, sums and total weight of a whole batch."""
        images = jnp.asarray(batch.image) if first else preprocessing.normalize(batch.image)
        images, targets = objective.vary(images, batch.target, batch.mask, model.num_classes, key)
        total = jnp.sum(objective.weights(targets), where=batch.mask)
        rows = _Rows(images, targets, batch.target, batch.mask, key)
        gradient = partial(jax.grad(loss, has_aux=True), state.trainable)
        count = len(batch.mask)
        if examples:
            count = examples[count]
            rows = rows.cut(0, count)
        size = (batch_size or count) // accumulate
        if accumulate == 1 or count <= size:
            found, (stats, sums) = gradient(state.stats, frozen, rows, total)
            return found, stats, sums, total

        def add(sofar: tuple[Tree, Tree, Metrics], part: _Rows) -> tuple[tuple, None]:
            found, (stats, sums) = gradient(sofar[1], frozen, part, total)
            added = jax.tree.map(jnp.add, (sofar[0], sofar[2]), (found, sums))
            return (added[0], stats, added[1]), None

        spread: Callable[[jax.Array], jax.Array] | None = devices.spread if devices else None
        if examples and devices and size % len(devices):
            spread = devices.gather  # equal shares would need padding
        parts, rest = rows.split(accumulate, size, count, spread)
        shapes = jax.eval_shape(gradient, state.stats, frozen, parts.first(), total)
        found, (_, sums) = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        sofar, _ = jax.lax.scan(add, (found, state.stats, sums), parts)
        return *(add(sofar, rest)[0] if rest else sofar), total

    def step(
        state: TrainState, frozen: Tree, batch: Batch, key: jax.Array, start: Tree = None
    ) -> tuple[TrainState, StepRecord]:
        trainable, _, opt_state, average = state
        found, stats, sums, weight = backward(state, frozen, batch, key)
        mean, sums = sums.loss, sums._replace(loss=sums.loss * sums.examples)
        if anchor:
            found = anchor.pull(found, trainable, start, model.head)
        kept = found if keep_gradients else None
        gradient_norms = gradients.group_norms(found, groups)
        total_norm = optax.tree.norm(found)
        if clip_norm:
            found, _ = gradients.clip(found, clip_norm)
        updates, opt_state = transform.update(found, opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        update_norms = gradients.group_norms(updates, groups)
        finite = jnp.isfinite(jnp.array([mean, total_norm, *update_norms.values()])).all()
        for path, x in zip(paths(stats), jax.tree.leaves(stats), strict=True):
            if (norms if isinstance(norms, str) else norms[layer(path)]) == "batch":
                finite &= jnp.isfinite(x).all()
        if ema:
            # What stands still must not move: optax.incremental_update rounds it, and XLA on CPU
            # makes zeros of subnormal numbers.
            average = jax.tree.map(
                lambda a, x: jnp.where(x == a, x, a + (1 - ema) * (x - a)),
                average,
                (trainable, stats),
            )
        new = TrainState(trainable, stats, opt_state, average)
        record = StepRecord(sums, gradient_norms, update_norms, finite, kept, weight)
        if skip_nonfinite:
            old = state._replace(opt_state=pass_step(state.opt_state))
            nothing = jax.tree.map(jnp.zeros_like, record)
            new, record = jax.tree.map(partial(jnp.where, finite), (new, record), (old, nothing))
        return devices.constrain((new, record)) if devices else (new, record)

    return jax.jit(step, donate_argnums=0)


class _Rows(NamedTuple):
    """A batch on its way through the network, with a leading axis of parts once it is split."""

    images: jax.Array
    targets: jax.Array
    """What the loss is of: [b k], or classes int [b]."""
    target: ArrayLike
    """Each image's own class, int [b]."""
    mask: ArrayLike
    key: jax.Array

    def cut(self, start: int, stop: int) -> "_Rows":
        return self._map(lambda x: x[start:stop], self.key)

    def split(
        self,
        accumulate: int,
        size: int,
        count: int,
        spread: Callable[[jax.Array], jax.Array] | None,
    ) -> tuple["_Rows", "_Rows | None"]:
        """Returns the parts of `size` rows among the first `count` rows, and the rows left."""
        keys = jax.random.split(self.key, accumulate)
        whole, left = divmod(min(count, accumulate * size), size)

        def split(x: jax.Array) -> jax.Array:
            parts = jnp.reshape(x[: whole * size], (whole, size, *x.shape[1:]))
            return spread(parts) if spread else parts

        rest = self.cut(whole * size, whole * size + left)._replace(key=keys[-1])
        return self._map(split, keys[:whole]), rest if left else None

    def _map(self, function: Callable[[jax.Array], jax.Array], key: jax.Array) -> "_Rows":
        images, targets, target, mask = (function(jnp.asarray(x)) for x in self[:-1])
        return _Rows(images, targets, target, mask, key)

    def first(self) -> "_Rows":
        return jax.tree.map(lambda x: x[0], self)
