"""Storage of cached features: in the host's memory, in a file, or in device memory.

Features in device memory never pass through the host. They are divided among the devices, and a
step gathers the rows of its batch from them, so that the host sends row indices only.
"""

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxft.data import Batch
from jaxft.devices import BATCH_AXIS, Devices
from jaxft.errors import RecipeError

_LANES = 128  # elements in the last dimension of a TPU's tile


@dataclass(frozen=True)
class HostStorage:
    """Features as NumPy arrays `[n ...]`, in memory or in a memory-mapped file.

    Attributes:
      devices: where features are computed.
      on_disk: whether to store them in a file of the temporary folder.
    """

    devices: Devices
    on_disk: bool

    def allocate(self, num_images: int, batch: jax.Array) -> np.ndarray:
        """Returns an uninitialised array for the features of all images.

        Raises:
          RecipeError: the disk has no room for the array.
        """
        shape = (num_images, *batch.shape[1:])
        if not self.on_disk:
            return np.empty(shape, batch.dtype)
        size = math.prod(shape) * batch.dtype.itemsize
        # The file has no name: the disk frees it together with the array.
        with tempfile.TemporaryFile() as file:
            try:  # reserves the room, as a full disk would later end the process by SIGBUS
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                raise RecipeError(
                    f"the features of frozen layers need {size / 2**20:,.0f} MiB more in "
                    f"{tempfile.gettempdir()}: {error.strerror}. Set TMPDIR to a folder with more "
                    "room, or disk_cache_mib to the room that is left."
                ) from error
            # A plain array: rows and batches cut from it are plain too. Its base holds the mapping.
            return np.asarray(np.memmap(file, batch.dtype, "r+", shape=shape))

    def write(self, array: np.ndarray, batch: jax.Array, first: int, count: int) -> np.ndarray:
        """Writes the first `count` rows of a batch `[b ...]` from row `first` on."""
        array[first : first + count] = self.devices.host(batch)[:count]
        return array

    def to_host(self, array: np.ndarray, num_images: int, row: tuple[int, ...]) -> np.ndarray:
        """Returns the array; see `DeviceStorage.to_host`."""
        return array


@dataclass(frozen=True)
class DeviceStorage:
    """Features as arrays `[n b s l]` of the split's batches, divided along `b` among the devices.

    Each device holds the rows that it has computed. A row is stored as a matrix `[s l]`: in any
    other shape, XLA would copy the whole array on TPU to gather from it.

    Attributes:
      devices: the devices.
      batch_size: images per batch; further rows are padding.
    """

    devices: Devices
    batch_size: int

    def num_rows(self, num_images: int) -> int:
        """Returns the number of rows of all devices, padding included."""
        return -(-num_images // self.batch_size) * self.devices.rows(self.batch_size)

    def shape(self, num_images: int, row: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """Returns shape, type and sharding of the array, for features of this shape and type."""
        rows = self.devices.rows(self.batch_size)
        lanes = _LANES if row.size % _LANES == 0 else row.size
        shape = (self.num_rows(num_images) // rows, rows, row.size // lanes, lanes)
        return self.devices.abstract_batch(jax.ShapeDtypeStruct(shape, row.dtype), stacked=True)

    def allocate(self, num_images: int, batch: jax.Array) -> jax.Array:
        """Returns an array of zeros for the features of all images."""
        like = self.shape(num_images, jax.ShapeDtypeStruct(batch.shape[1:], batch.dtype))
        zeros = jax.jit(lambda: jnp.zeros(like.shape, like.dtype), out_shardings=like.sharding)
        return zeros()

    def write(self, array: jax.Array, batch: jax.Array, first: int, count: int) -> jax.Array:
        """Writes a batch `[b ...]`, whose first row is row `first`; donates the array."""
        number = np.int32(first // self.batch_size)
        return _write(array.sharding)(array, batch, number)

    def take(self, array: jax.Array, batch: Batch, row: tuple[int, ...]) -> jax.Array:
        """Returns the features `[b *row]` of a batch that holds indices of images, int32 `[b]`.

        Rows outside the mask are zeros. Call it within a compiled function.
        """
        images = jnp.where(batch.mask, jnp.asarray(batch.image), -1)
        gather = jax.shard_map(
            partial(_gather, batch_size=self.batch_size, num_devices=len(self.devices)),
            mesh=self.devices.mesh,
            in_specs=(PartitionSpec(None, BATCH_AXIS), PartitionSpec()),
            out_specs=PartitionSpec(BATCH_AXIS),
        )
        return gather(array, images).reshape(-1, *row)

    def take_in_order(self, array: jax.Array, batch: Batch, row: tuple[int, ...]) -> jax.Array:
        """Returns what `take` returns, for one of the batches that were written.

        Nothing is exchanged, as each device holds its rows.
        """
        number = jnp.asarray(batch.image)[0] // self.batch_size
        features = jax.lax.dynamic_index_in_dim(array, number, keepdims=False)
        features = jnp.where(jnp.asarray(batch.mask)[:, None, None], features, 0)
        return features.reshape(-1, *row)

    def to_host(self, array: jax.Array, num_images: int, row: tuple[int, ...]) -> np.ndarray:
        """Returns the features `[n f *row]` as a NumPy array in every process. A collective."""
        rows: np.ndarray = self.devices.host(array)[:, : self.batch_size]
        return rows.reshape(math.prod(rows.shape[:2]), -1, *row)[:num_images]


Storage = HostStorage | DeviceStorage
Features = np.ndarray | jax.Array
"""Features of all images of a split in a storage."""


@lru_cache
def _write(sharding: NamedSharding) -> Callable[..., jax.Array]:
    def write(array: jax.Array, batch: jax.Array, number: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_index_in_dim(array, batch.reshape(array.shape[1:]), number, 0)

    return jax.jit(write, donate_argnums=0, out_shardings=sharding)


def _gather(part: jax.Array, images: jax.Array, *, batch_size: int, num_devices: int) -> jax.Array:
    """Returns this device's rows of a batch, which all devices exchange.

    A device that sent each other one as many rows as a batch may need would send `num_devices`
    times the rows that it is asked for. It sends a few more than the mean instead, and where a
    receiver needs more, all devices repeat the exchange.

    Args:
      part: rows `[n p s l]` that this device stores.
      images: index of each row of the batch `[b]`, on all devices; -1: a row of zeros.
      batch_size, num_devices: see `DeviceStorage`.
    """
    rows = len(images) // num_devices  # of the result
    index, position = jnp.divmod(images, batch_size)
    source, position = jnp.divmod(position, part.shape[1])
    if num_devices == 1:
        found = part.at[index, position].get(mode="clip")
        return jnp.where((images >= 0)[:, None, None], found, 0)
    me = jax.lax.axis_index(BATCH_AXIS)
    mean = rows / num_devices
    size = min(rows, math.ceil(mean + 4 * math.sqrt(mean)))  # rows of a message
    index, position, source = (x.reshape(num_devices, rows) for x in (index, position, source))
    # Number of each row among those that its receiver needs from the same source.
    is_from = source[:, :, None] == jnp.arange(num_devices)  # [receiver row source]
    number = jnp.sum(is_from * (jnp.cumsum(is_from, 1) - 1), 2)
    number = jnp.where(images.reshape(number.shape) < 0, -1, number)

    def exchange(round: Any, result: jax.Array) -> jax.Array:
        slot = number - round * size
        is_sent = (slot >= 0) & (slot < size)
        place = jnp.arange(num_devices)[:, None], jnp.where(is_sent & (source == me), slot, size)
        message = [
            jnp.zeros((num_devices, size), jnp.int32).at[place].set(x, mode="drop")
            for x in (index, position)
        ]
        sent = part.at[*message].get(mode="clip")
        received = jax.lax.all_to_all(sent, BATCH_AXIS, 0, 0)
        found = received.at[source[me], slot[me]].get(mode="clip")
        return jnp.where(is_sent[me][:, None, None], found, result)

    result = exchange(0, jnp.zeros((rows, *part.shape[2:]), part.dtype))
    if size == rows:
        return result
    return jax.lax.fori_loop(1, jnp.max(number) // size + 1, exchange, result)
