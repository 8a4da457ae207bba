"""The training step: gradients of the trainable half, through one multi_transform, donated."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxft.data import Batch, Preprocessing
from jaxft.labels import Tree, combine
from jaxft.models import Model, Norms
from jaxft.train.objective import Objective


class TrainState(NamedTuple):
    """What a step changes: the trainable half (`None` where frozen), statistics, optimizer."""

    trainable: Tree
    stats: Tree
    opt_state: optax.OptState


class Tally(NamedTuple):
    """Sums over the examples seen, padding left out; scalars."""

    loss: jax.Array
    correct: jax.Array
    examples: jax.Array


def tally(logits: jax.Array, batch: Batch) -> Tally:
    """Cross entropy and hits of logits `[b k]`, summed over the rows that are not padding."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.target)
    correct = logits.argmax(-1) == batch.target
    return Tally(
        loss=jnp.sum(losses, where=batch.mask),
        correct=jnp.sum(correct, where=batch.mask),
        examples=jnp.sum(batch.mask),
    )


def train_step(
    model: Model,
    transform: optax.GradientTransformation,
    preprocessing: Preprocessing,
    norms: Norms,
    objective: Objective = Objective(),
    *,
    replicas: int = 1,
) -> Callable[[TrainState, Tree, Batch, jax.Array], tuple[TrainState, Tally]]:
    """The jitted step of a stage: `(state, frozen, batch, key) -> (state, tally)`.

    The loss is the mean cross entropy over the batch's actual rows, or as `objective` has it.
    Gradients are taken of the trainable half alone, so that the compiled step has no backward pass
    through what lies before it. The state is donated: its buffers are the next state's. `key`
    draws dropout, erasing and mixing. With `replicas`, each of so many equal parts of a batch has
    batch statistics of its own, as in torch's `DistributedDataParallel`.

    The tally's `loss` is the loss that is minimised, times the rows; its `correct` are hits of each
    image's own class, whatever is mixed into it.
    """

    def loss(
        trainable: Tree, stats: Tree, frozen: Tree, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple]:
        images = preprocessing.normalize(batch.image)
        images, targets = objective.vary(images, batch.target, batch.mask, model.num_classes, key)
        params = combine(trainable, frozen)
        logits, stats = model.apply(
            params, stats, images, norms=norms, mask=batch.mask, replicas=replicas, key=key
        )
        sums = tally(logits, batch)
        if targets is None:
            return sums.loss / sums.examples, (stats, sums)
        mean = objective.mean_loss(logits, targets, batch.mask)
        return mean, (stats, sums._replace(loss=mean * sums.examples))

    def step(
        state: TrainState, frozen: Tree, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, Tally]:
        trainable, stats, opt_state = state
        gradient = jax.grad(loss, has_aux=True)
        gradients, (stats, sums) = gradient(trainable, stats, frozen, batch, key)
        updates, opt_state = transform.update(gradients, opt_state, trainable)
        return TrainState(optax.apply_updates(trainable, updates), stats, opt_state), sums

    return jax.jit(step, donate_argnums=0)
