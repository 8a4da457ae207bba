"""Several batches in one call of a compiled program: `Recipe.steps_per_execution`, as in Keras.

A small network then does not wait for Python. Calls differ in how many batches they fill; the
results do not depend on where calls begin, to the last bit. The host looks for signals, and at a
stage's time limit, between calls only.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data import Batch
from jaxft.devices import Devices
from jaxft.labels import Tree

S = TypeVar("S")
R = TypeVar("R")


def groups(batches: Iterable[Batch], steps_per_call: int) -> Iterator[list[Batch]]:
    """Yields up to `steps_per_call` consecutive batches at a time, all of one shape."""
    for _, same_shape in groupby(batches, lambda batch: len(batch.mask)):
        while group := list(islice(same_shape, steps_per_call)):
            yield group


def sent(devices: Devices, batches: Sequence[Batch], steps_per_call: int) -> tuple[Any, ...]:
    """Starts to send batches to the devices; returns the arguments of a compiled program.

    With `steps_per_call == 1`, returns `(batch,)`. Otherwise stacks the batches along a new leading
    axis, zero-pads it to `steps_per_call`, and returns `(stacked, count)`.
    """
    if steps_per_call == 1:
        return (devices.batch(batches[0]),)

    def stack(*arrays: np.ndarray) -> np.ndarray:
        filled = np.zeros((steps_per_call, *arrays[0].shape), arrays[0].dtype)
        np.stack(arrays, out=filled[: len(arrays)])
        return filled

    return devices.batch(jax.tree.map(stack, *batches), stacked=True), np.int32(len(batches))


def one_by_one(
    step: Callable[[S, Batch, jax.Array], tuple[S, R]],
    carry: S,
    batches: Batch,
    count: jax.Array,
) -> tuple[S, R]:
    """Calls `step(carry, batch, i) -> (carry, record)` for the first `count` of stacked batches.

    Returns the last carry, and the records along a leading axis; those beyond `count` are zero.
    """

    def batch(i: Any) -> Batch:
        return jax.tree.map(lambda x: x[i], batches)

    steps_per_call = len(batches.mask)
    _, record = jax.eval_shape(step, carry, batch(0), count)
    records = jax.tree.map(lambda x: jnp.zeros((steps_per_call, *x.shape), x.dtype), record)

    def body(i: jax.Array, sofar: tuple[S, R]) -> tuple[S, R]:
        carry, records = sofar
        carry, record = step(carry, batch(i), i)
        return carry, jax.tree.map(lambda stacked, x: stacked.at[i].set(x), records, record)

    result: tuple[S, R] = jax.lax.fori_loop(0, count, body, (carry, records))
    return result


def apart(records: R, count: int, steps_per_call: int) -> list[R]:
    """Returns the first `count` of stacked records, or the only one."""
    if steps_per_call == 1:
        return [records]
    return [jax.tree.map(lambda x, i=i: x[i], records) for i in range(count)]


def several_steps(step: Callable[..., tuple[S, R]], devices: Devices) -> Callable[..., tuple[S, R]]:
    """Returns `(state, frozen, batches, count, number, *rest) -> (state, records)`.

    It takes the first `count` of stacked batches; `number` is the global step of the first.
    `rest` are the further arguments of `step`.
    """

    def steps(
        state: S,
        frozen: Tree,
        batches: Batch,
        count: jax.Array,
        number: jax.Array,
        *rest: Any,
    ) -> tuple[S, R]:
        def one(state: S, batch: Batch, i: Any) -> tuple[S, R]:
            return step(state, frozen, batch, number + i, *rest)

        # The loop leaves the sharding of its results open.
        return devices.constrain(one_by_one(one, state, batches, count))

    return steps
