"""Several batches in one call of a compiled program, so that small networks do not wait for Python.

Keras calls it `steps_per_execution`. The calls of a program differ in how many of its places for
batches they fill: what it computes of a batch is the same to the last bit, wherever calls begin.
Signals, and whether a stage's `minutes` are over, are looked at between calls only.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.data import Batch
from jaxft.distributed import Devices

T = TypeVar("T")


def groups(batches: Iterable[Batch], places: int) -> Iterator[list[Batch]]:
    """Yields up to `places` consecutive batches at a time, all of one shape."""
    for _, alike in groupby(batches, lambda batch: len(batch.mask)):
        while group := list(islice(alike, places)):
            yield group


def sent(devices: Devices, batches: Sequence[Batch], places: int) -> tuple[Any, ...]:
    """Batches on their way to the devices, as arguments of a program of so many places.

    Of one place: the batch. Of more: up to so many, stacked on a leading axis, the rest of which is
    zeros, and their number.
    """
    if places == 1:
        return (devices.batch(batches[0]),)

    def stack(*arrays: np.ndarray) -> np.ndarray:
        filled = np.zeros((places, *arrays[0].shape), arrays[0].dtype)
        np.stack(arrays, out=filled[: len(arrays)])
        return filled

    return devices.batch(jax.tree.map(stack, *batches), stacked=True), np.int32(len(batches))


def one_by_one(
    step: Callable[[T, Batch, jax.Array], tuple[T, Any]],
    carry: T,
    batches: Batch,
    count: jax.Array,
) -> tuple[T, Any]:
    """`step(carry, batch, i) -> (carry, record)` of the first `count` of stacked batches.

    Records come back on a leading axis, beyond `count` zeros.
    """

    def batch(i: Any) -> Batch:
        return jax.tree.map(lambda x: x[i], batches)

    places = len(batches.mask)
    _, record = jax.eval_shape(step, carry, batch(0), count)
    records = jax.tree.map(lambda x: jnp.zeros((places, *x.shape), x.dtype), record)

    def further(i: jax.Array, sofar: tuple[T, Any]) -> tuple[T, Any]:
        carry, records = sofar
        carry, record = step(carry, batch(i), i)
        return carry, jax.tree.map(lambda all, own: all.at[i].set(own), records, record)

    done: tuple[T, Any] = jax.lax.fori_loop(0, count, further, (carry, records))
    return done


def apart(records: T, count: int, places: int) -> list[T]:
    """The first `count` of stacked records, or the only one."""
    if places == 1:
        return [records]
    return [jax.tree.map(lambda x, i=i: x[i], records) for i in range(count)]
