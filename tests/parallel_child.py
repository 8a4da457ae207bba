"""Trains three steps on virtual devices, for test_distributed.py.

    python tests/parallel_child.py OUT [COORDINATOR PROCESSES PROCESS]

Writes the trained parameters of each case to OUT.npz and observations to OUT.json.
"""

import json
import os
import signal
import sys

import jax
import numpy as np
import optax
from PIL import Image

import jaxft.devices
from jaxft import SGD, Stage, distributed, models, partition, plan
from jaxft.data import BatchConfig, Preprocessing, train_batches
from jaxft.devices import Devices
from jaxft.labels import combine
from jaxft.train.train_step import StepConfig, TrainState, train_step

MODEL = models.create("cifar_resnet8", num_classes=5)
BATCH_SIZE, STEPS = 10, 3


class Noise:
    """Random images for a whole number of batches."""

    classes = tuple("abcde")
    targets = (np.arange(STEPS * BATCH_SIZE) % 5).astype(np.int32)

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
        return Image.fromarray(pixels), int(self.targets[index])


def train(devices):
    """Returns parameters, statistics and losses of three donated steps, and observations."""
    preprocessing = Preprocessing(image_size=8, resize_size=None)
    params, stats = MODEL.init(jax.random.key(0))
    stage = plan([Stage("late", {"layer*": 0.1, "fc": 0.1}, 1)], params)[0]
    transform = stage.transform(SGD(momentum=0.9))
    step = train_step(
        StepConfig(
            model=MODEL,
            transform=transform,
            preprocessing=preprocessing,
            norms="batch",
            devices=devices,
        )
    )
    trainable, frozen = partition(params, stage.labels)
    start = TrainState(trainable, stats, transform.init(params))
    state, frozen = devices.put(start), devices.put(frozen)
    expected = devices.shardings(start)
    losses, stable, donated = [], [], []
    batches = train_batches(
        Noise(),
        BatchConfig(
            preprocessing=preprocessing,
            augment="none",
            batch_size=BATCH_SIZE,
            rows=devices.rows(BATCH_SIZE),
            shard=devices.shard,
            seed=0,
            stage=0,
        ),
        epochs=1,
    )
    for part in batches:
        before = state
        batch = devices.batch(part)
        state, (sums, *_) = step(state, frozen, batch, jax.random.key(1))
        losses.append(float(sums.loss) / float(sums.examples))
        stable.append(jax.tree.map(lambda x: x.sharding, state) == expected)
        donated.append(all(leaf.is_deleted() for leaf in jax.tree.leaves(before)))
    trained = devices.host((combine(state.trainable, frozen), state.stats))
    observed = {
        "rows": batch.mask.shape[0],
        "batch": str(batch.image.sharding.spec),
        "programs": step._cache_size(),
        "stable": all(stable),
        "donated": all(donated),
        "divided": sum(not x.sharding.is_fully_replicated for x in jax.tree.leaves(state)),
    }
    return np.hstack([*map(np.ravel, jax.tree.leaves(trained)), losses]), observed


def layout(devices):
    """Returns the shardings of a tree, and whether it survives placing and fetching."""
    tree = {
        "tall": np.arange(2.0**13).reshape(1024, 8),
        "square": np.ones((3, 3, 64, 64), np.float16),
        "odd": np.ones((1023, 65), np.float32),
        "small": np.ones((64, 8), np.float32),
        "scalar": np.float32(1),
        "hole": None,
        "state": (optax.EmptyState(), optax.MaskedNode()),
    }
    keyed = {**tree, "key": jax.random.key(0)}
    abstract = devices.abstract(keyed)
    placed = devices.put(tree)
    again = devices.put(placed)
    back = devices.host(again)
    canonical = jax.tree.map(lambda x: x.astype(jax.dtypes.canonicalize_dtype(x.dtype)), tree)
    specs = jax.tree.map(lambda x: str(x.sharding.spec), abstract)
    return {
        "specs": {name: spec for name, spec in specs.items() if isinstance(spec, str)},
        "structure": jax.tree.structure(abstract) == jax.tree.structure(keyed),
        "put": jax.tree.map(lambda x: x.sharding, placed) == devices.shardings(tree),
        "stays": all(x is y for x, y in zip(*map(jax.tree.leaves, (placed, again)), strict=True)),
        "back": jax.tree.structure(back) == jax.tree.structure(tree)
        and all(
            isinstance(x, np.ndarray | np.generic) and x.dtype == y.dtype and np.array_equal(x, y)
            for x, y in zip(*map(jax.tree.leaves, (back, canonical)), strict=True)
        ),
    }


def main(out, *joining):
    signals = []
    signal.signal(signal.SIGTERM, lambda number, frame: signals.append(number))
    distributed.start(*(kind(x) for kind, x in zip((str, int, int), joining, strict=False)))
    jaxft.devices.LARGE = 2**12  # the largest array of this network has 2**16 elements
    cases = {sharding: Devices(sharding) for sharding in ("replicated", "fsdp")}
    if jax.process_count() == 1:
        one = jax.sharding.Mesh(jax.devices()[:1], ("batch",))
        cases["one"] = Devices(mesh=one)
    trained = {case: train(devices) for case, devices in cases.items()}
    observed = {case: observed for case, (_, observed) in trained.items()}
    observed["first"] = distributed.is_main_process()
    observed["any"] = [distributed.any_process(False), distributed.any_process(observed["first"])]
    observed["layout"] = {case: layout(devices) for case, devices in cases.items()}
    observed["shard"] = cases["fsdp"].shard
    if joining:
        distributed.start()  # does nothing
    os.kill(os.getpid(), signal.SIGTERM)
    observed["signals"] = signals
    distributed.barrier("end")
    np.savez(f"{out}.npz", **{case: array for case, (array, _) in trained.items()})
    with open(f"{out}.json", "w") as file:
        json.dump(observed, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
