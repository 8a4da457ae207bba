"""Trains three steps on virtual devices, for test_distributed.py.

    python tests/parallel_child.py OUT [COORDINATOR PROCESSES PROCESS]

Writes the trained parameters of each case to OUT.npz and observations to OUT.json.
"""

import json
import os
import re
import signal
import sys
from collections import Counter
from functools import partial

import jax
import numpy as np
import optax
from PIL import Image

import jaxft.devices
from jaxft import SGD, Stage, distributed, models, partition, plan
from jaxft.data import Batch, BatchConfig, Preprocessing, train_batches
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


def train_replicas(devices, replicas):
    """Returns parameters and statistics of a step with separate batch statistics; its collectives.

    The last six of 16 rows are padding, so that some replicas have none but padding.
    """
    preprocessing = Preprocessing(image_size=8, resize_size=None)
    params, stats = devices.put(MODEL.init(jax.random.key(0)))
    transform = optax.sgd(0.1)
    config = StepConfig(
        model=MODEL, transform=transform, preprocessing=preprocessing, norms="batch",
        replicas=replicas, devices=devices,
    )  # fmt: skip
    image = np.stack([np.asarray(Noise()[i][0]) // (1 + i // 4) for i in range(16)])
    batch = devices.batch(Batch(image, np.arange(16, dtype=np.int32) % 5, np.arange(16) < 10))
    arguments = (
        TrainState(params, stats, transform.init(params)),
        jax.tree.map(lambda _: None, params),
    )
    step = train_step(config)
    text = step.lower(*arguments, batch, jax.random.key(1)).compile().as_text()
    state, _ = step(*arguments, batch, jax.random.key(1))
    trained = jax.tree.leaves(devices.host((state.trainable, state.stats)))
    return np.hstack([*map(np.ravel, trained)]), collectives(text)


def collectives(text):
    """Returns the kinds of a program's collectives, and the groups of the all-gathers."""
    kinds = re.findall(r" (all-\w+|collective-permute|reduce-scatter)\(", text)
    return dict(Counter(kinds)), re.findall(r" all-gather\(.*replica_groups=(\S+)", text)


def stack_parts(devices, count, size):
    """Returns whether the parts of a batch hold its rows, their sharding, and the collectives."""
    batch = np.zeros((devices.rows(count * size), 2), np.uint8)
    batch[: count * size] = np.arange(count * size)[:, None]
    expected = batch[: count * size].reshape(count, size, 2)
    function, batch = (
        jax.jit(partial(devices.stack_parts, count=count, size=size)),
        devices.batch(batch),
    )
    parts = function(batch)
    whole = devices.host(parts)
    is_padded = not whole[:, size:].any()
    return [
        np.array_equal(whole[:, :size], expected) and is_padded,
        list(whole.shape),
        str(parts.sharding.spec),
        collectives(function.lower(batch).compile().as_text())[0],
    ]


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
    if jax.process_count() == 1:
        for count in (1, 2, 8, 16):
            for case in ("one", "replicated"):
                trained[f"{case}, {count} replicas"] = train_replicas(cases[case], count)
    observed = {case: observed for case, (_, observed) in trained.items()}
    if jax.process_count() == 1:
        shapes = ((4, 16), (16, 8), (3, 8), (4, 6))
        observed["parts"] = [stack_parts(cases["replicated"], *shape) for shape in shapes]
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
