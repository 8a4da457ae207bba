"""Stores features on 1, 2, 4 and 8 virtual devices, for test_feature_storage.py.

Prints one line of JSON for each case: whether the taken rows are the stored ones, and the
collectives of the program that takes them.
"""

import json

import jax
import numpy as np
from jax.sharding import Mesh

from jaxft.data import Batch
from jaxft.devices import Devices
from jaxft.hlo_cost import hlo_cost
from jaxft.train.feature_storage import DeviceStorage

# Batch size, images and shape of their features.
CASES = ((10, 37, (2, 3)), (64, 300, (4, 5)), (512, 1100, (2, 64)))
RNG = np.random.default_rng(0)


def equal(found, expected):
    return found.tobytes() == np.asarray(expected, found.dtype).tobytes()


def stored(storage, features):
    """Returns an array to which the features have been written, batch by batch."""
    array = None
    rows = storage.devices.rows(storage.batch_size)
    for first in range(0, len(features), storage.batch_size):
        part = features[first : first + storage.batch_size]
        padded = np.full((rows, 1, *part.shape[1:]), np.nan, part.dtype)
        padded[: len(part), 0] = part
        batch = storage.devices.batch(padded)
        if array is None:
            array = storage.allocate(len(features), batch)
        array = storage.write(array, batch, first, len(part))
    return array


def batch_of(storage, images):
    """Returns a batch of indices on the devices, and the same padded on the host."""
    rows = storage.devices.rows(storage.batch_size)
    padded = np.zeros(rows, np.int32)
    padded[: len(images)] = images
    return storage.devices.batch(Batch(padded, padded, np.arange(rows) < len(images)))


def main():
    for count in (1, 2, 4, 8):
        devices = Devices(mesh=Mesh(np.array(jax.devices()[:count]), ("batch",)))
        for batch_size, num_images, row in CASES:
            storage = DeviceStorage(devices, batch_size)
            features = RNG.normal(size=(num_images, *row)).astype(np.float32)
            array = stored(storage, features)
            batches = [RNG.permutation(num_images)[:size] for size in (batch_size, batch_size - 3)]
            # All rows from one device: more than a message holds.
            batches += [np.full(batch_size, image) for image in (0, num_images - 1)]
            in_order = np.split(np.arange(num_images), range(batch_size, num_images, batch_size))
            take = jax.jit(lambda *x, storage=storage, row=row: storage.take(*x, row))
            next_batch = jax.jit(
                lambda *x, storage=storage, row=row: storage.take_in_order(*x, row)
            )
            compiled = take.lower(array, batch_of(storage, batches[0])).compile()
            results = [
                (np.asarray(function(array, batch_of(storage, images))), images)
                for function, cases in ((take, batches), (next_batch, in_order))
                for images in cases
            ]
            cost = hlo_cost(compiled)
            line = {
                "devices": count,
                "equal": [equal(x[: len(images)], features[images]) for x, images in results],
                "padding": [float(abs(x[len(images) :]).sum()) for x, images in results],
                "back": equal(storage.to_host(array, num_images, row)[:, 0], features),
                "divided": array.sharding.shard_shape(array.shape)[1] * count == array.shape[1],
                "collectives": cost.collectives,
                "bytes": cost.collective_bytes,
                "batch": array[0].nbytes,
            }
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
