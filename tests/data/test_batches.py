"""Batches: their examples and order, with any number of workers and processes, and their end."""

import gc
import hashlib
import itertools
import resource
import subprocess
import sys
import threading
from contextlib import closing
from typing import get_args

import numpy as np
import pytest
from PIL import Image

from jaxft.data import (
    Augment,
    Batch,
    BatchConfig,
    Preprocessing,
    eval_batches,
    open_source,
    steps_per_epoch,
    train_batches,
)
from jaxft.errors import DataError

PLAIN = Preprocessing(image_size=8, resize_size=None)


class Numbered:
    """A source of `count` grey images whose level is their index; `broken` ones raise an error."""

    classes = ("even", "odd")

    def __init__(self, count, broken=()):
        self.targets = (np.arange(count) % 2).astype(np.int32)
        self.broken = broken

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if index in self.broken:
            raise DataError(f"example {index} cannot be read")
        return Image.new("RGB", (8, 8), (index,) * 3), int(self.targets[index])


def batches(source, *, preprocessing=PLAIN, **changes):
    """Returns the training batches, of one epoch by default."""
    names = ("epochs", "first_epoch", "first_step", "workers", "features")
    position = {"epochs": 1, **{name: changes.pop(name) for name in names if name in changes}}
    options = {"augment": "none", "batch_size": 8, "seed": 0, "stage": 0, **changes}
    return train_batches(source, BatchConfig(preprocessing=preprocessing, **options), **position)


def digests(batches):
    return [hashlib.sha256(b"".join(a.tobytes() for a in batch)).hexdigest() for batch in batches]


def indices(batches):
    """Returns the examples of each batch of a `Numbered` source."""
    return [batch.image[batch.mask][:, 0, 0, 0].tolist() for batch in batches]


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (7, 1), (8, 1), (9, 2), (24, 3)])
def test_batches_hold_every_example_once_and_mask_padding(count, steps):
    source = Numbered(count)
    assert steps_per_epoch(source, 8) == steps
    for epoch in (
        list(batches(source)),
        list(eval_batches(source, PLAIN, batch_size=8, workers=0)),
    ):
        assert len(epoch) == steps
        assert sorted(itertools.chain(*indices(epoch))) == list(range(count))
        for batch in epoch:
            image, target, mask = batch
            assert (image.shape, image.dtype) == ((8, 8, 8, 3), np.uint8)
            assert (target.shape, target.dtype) == ((8,), np.int32)
            assert (mask.shape, mask.dtype) == ((8,), np.bool_)
            np.testing.assert_array_equal(target[mask], image[mask][:, 0, 0, 0] % 2)
            assert not image[~mask].any()
            assert not target[~mask].any()
        mask = np.concatenate([batch.mask for batch in epoch])
        np.testing.assert_array_equal(mask, np.arange(steps * 8) < count)  # padding comes last


def test_eval_batches_keep_the_order():
    examples = indices(eval_batches(Numbered(20), PLAIN, batch_size=8, workers=2))
    assert list(itertools.chain(*examples)) == list(range(20))


def test_train_batches_order_depends_on_seed_stage_and_epoch():
    source = Numbered(30)
    order = list(itertools.chain(*indices(batches(source, epochs=2))))
    first, second = order[:30], order[30:]
    others = [
        list(itertools.chain(*indices(batches(source, **change))))
        for change in ({"seed": 1}, {"stage": 1})
    ]
    assert sorted(first) == sorted(second) == list(range(30))
    assert len({tuple(order) for order in (first, second, *others)}) == 4


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("augment", get_args(Augment))
def test_train_batches_do_not_depend_on_workers(augment, balanced):
    source, _ = open_source("digits:0-1", shots=10)
    options = {"augment": augment, "balanced": balanced, "epochs": 3}
    expected = digests(batches(source, workers=0, **options))
    assert len(set(expected)) == len(expected) == 3 * steps_per_epoch(source, 8) == 9
    for workers in (2, 4):
        assert digests(batches(source, workers=workers, **options)) == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_train_batches_resume_at_any_step(workers, drop_last, balanced):
    source, _ = open_source("digits:0-1", shots=10)
    options = {"augment": "trivialaugment", "epochs": 3, "balanced": balanced}
    options |= {"drop_last": drop_last}
    uninterrupted = digests(batches(source, **options))
    steps = steps_per_epoch(source, 8, drop_last=drop_last)
    for step in range(len(uninterrupted) + 1):
        first_epoch, first_step = divmod(step, steps)
        resumed = batches(
            source, first_epoch=first_epoch, first_step=first_step, workers=workers, **options
        )
        assert digests(resumed) == uninterrupted[step:]


def joined(shards):
    """Concatenates the parts of all processes to whole batches."""
    return [
        Batch(*map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*shards, strict=True)
    ]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_batch_shards_are_parts_of_the_whole_batch(count):
    source, _ = open_source("digits:0-1", shots=10)  # 2 batches of 8 and one of 4
    shards = [(index, count) for index in range(count)]
    for make in (
        lambda shard: batches(source, augment="jitter", epochs=2, workers=2, shard=shard),
        lambda shard: batches(source, augment="shift", balanced=True, shard=shard),
        lambda shard: eval_batches(source, PLAIN, batch_size=8, workers=2, shard=shard),
    ):
        parts = [list(make(shard)) for shard in shards]
        assert {len(batch.mask) for part in parts for batch in part} == {8 // count}
        assert digests(joined(parts)) == digests(make((0, 1)))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_batch_rows_beyond_examples_are_padding(count):
    source, _ = open_source("digits:0-1", shots=10)  # 3 batches of 6 and one of 2
    for make in (
        lambda **changes: batches(source, batch_size=6, augment="shift", **changes),
        lambda **changes: eval_batches(source, PLAIN, batch_size=6, workers=2, **changes),
    ):
        shards = [list(make(rows=8, shard=(index, count))) for index in range(count)]
        assert {len(batch.mask) for part in shards for batch in part} == {8 // count}
        unpadded = list(make())
        padded = [
            Batch(*(np.pad(array, [(0, 2)] + [(0, 0)] * (array.ndim - 1)) for array in batch))
            for batch in unpadded
        ]
        assert len(unpadded) == 4
        assert digests(joined(shards)) == digests(padded)


def test_batch_shard_decodes_its_examples_only():
    decoded = []

    class Recording(Numbered):
        def __getitem__(self, index):
            decoded.append(index)
            return super().__getitem__(index)

    shard = list(batches(Recording(20), shard=(1, 4)))
    assert sorted(decoded) == sorted(itertools.chain(*indices(shard)))
    assert len(decoded) == 6  # rows 2 and 3 of two full batches and of a last batch with 4 rows


@pytest.mark.slow
def test_batch_shards_in_two_processes(tmp_path):
    program = """
import sys
import numpy as np
from jaxft.data import BatchConfig, Preprocessing, open_source, train_batches
source, _ = open_source("digits:0-1", shots=10)
config = BatchConfig(preprocessing=Preprocessing(image_size=8, resize_size=None), augment="shift",
                     batch_size=8, seed=0, stage=0, shard=(int(sys.argv[1]), 2))
batches = train_batches(source, config, epochs=2, workers=2)
arrays = {f"{name}{k}": a for k, batch in enumerate(batches) for name, a in zip("itm", batch)}
np.savez(sys.argv[2], **arrays)
"""
    files = [tmp_path / "0.npz", tmp_path / "1.npz"]
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", program, str(k), str(file)])
        for k, file in enumerate(files)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    shards = []
    for file in files:
        with np.load(file) as arrays:
            shards.append([Batch(*(arrays[f"{n}{k}"] for n in "itm")) for k in range(6)])
    source, _ = open_source("digits:0-1", shots=10)
    assert digests(joined(shards)) == digests(batches(source, augment="shift", epochs=2))


@pytest.mark.parametrize(
    ("rows", "shard", "message"),
    [
        (None, (0, 3), "batches of 8 rows do not divide among 3 processes.*a multiple of 3"),
        (10, (0, 3), "batches of 10 rows do not divide among 3 processes"),
        (7, (0, 1), "batches of 8 do not fit into 7 rows"),
        (None, (2, 2), r"shard \(2, 2\) is not"),
        (None, (-1, 2), r"shard \(-1, 2\) is not"),
        (None, (0, 0), r"shard \(0, 0\) is not"),
    ],
)
def test_batch_shard_error(rows, shard, message):
    with pytest.raises(DataError, match=message):
        batches(Numbered(20), rows=rows, shard=shard)
    with pytest.raises(DataError, match=message):
        eval_batches(Numbered(20), PLAIN, batch_size=8, workers=0, rows=rows, shard=shard)


@pytest.mark.parametrize(("count", "steps"), [(8, 1), (9, 1), (15, 1), (16, 2)])
def test_drop_last_leaves_out_padded_batches(count, steps):
    source = Numbered(count)
    two_epochs = list(batches(source, drop_last=True, epochs=2))
    assert len(two_epochs) == 2 * steps_per_epoch(source, 8, drop_last=True) == 2 * steps
    assert all(batch.mask.all() for batch in two_epochs)
    examples = indices(batches(source, drop_last=True))
    assert examples == indices(batches(source))[:steps]
    assert len(set(itertools.chain(*examples))) == 8 * steps


def test_drop_last_without_full_batch_is_an_error():
    with pytest.raises(DataError, match="nothing of 7 images in batches of 8: set batch_size to a"):
        batches(Numbered(7), drop_last=True)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_train_batches_memory_does_not_grow():
    source, _ = open_source("digits", shots=20)
    preprocessing = Preprocessing(image_size=32, resize_size=32)
    stream = batches(
        source,
        preprocessing=preprocessing,
        batch_size=32,
        augment="shift_flip",
        epochs=50,
        workers=2,
    )
    memory = []
    for step, _ in enumerate(stream):
        if step % (5 * steps_per_epoch(source, 32)) == 0:
            gc.collect()
            memory.append(resident_bytes())
    assert len(memory) == 10
    # The batches of the 45 epochs after the first 5 would take 31 MB.
    assert max(memory) - max(memory[:2]) < 8e6


def test_augmentation_depends_on_the_example_not_its_position():
    source, _ = open_source("digits:0", shots=12)

    def views(**changes):
        stream = batches(source, augment="shift", **changes)
        return sorted(image.tobytes() for batch in stream for image in batch.image[batch.mask])

    assert views() == views(batch_size=5) == views(batch_size=5, workers=3)
    for change in ({"seed": 1}, {"stage": 1}, {"first_epoch": 1, "epochs": 2}):
        assert views() != views(**change)


def test_balanced_epochs_repeat_rare_classes_with_other_augmentations():
    source, _ = open_source("digits:0-1", shots=20)
    zeros, ones = (np.flatnonzero(source.targets == k) for k in (0, 1))
    imbalanced = source.take(np.concatenate([zeros, ones[:2]]))
    four_epochs = list(batches(imbalanced, augment="shift", balanced=True, epochs=4))
    assert sum(batch.mask.sum() for batch in four_epochs) == 4 * len(imbalanced)
    ones = [image.tobytes() for b in four_epochs for image in b.image[b.mask & (b.target == 1)]]
    assert len(ones) > 20  # views of 2 images; 8 without balancing
    assert len(set(ones)) > 6


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_batches_raise_the_error_of_an_image(workers):
    source = Numbered(64, broken=(5,))
    for stream in (
        batches(source, epochs=50, workers=workers),
        eval_batches(source, PLAIN, batch_size=8, workers=workers),
    ):
        with pytest.raises(DataError) as caught:
            list(stream)
        assert str(caught.value) == "example 5 cannot be read"
    assert_threads_end()


def assert_threads_end():
    for thread in threading.enumerate():
        if thread.name.startswith("jaxft-data"):
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_batches_end_their_threads_when_closed():
    with closing(batches(Numbered(64), epochs=1000, workers=4)) as stream:
        assert next(stream).mask.all()
        assert any(thread.name.startswith("jaxft-data") for thread in threading.enumerate())
    assert_threads_end()
    assert next(stream, None) is None


def test_batches_end_their_threads_after_the_last_batch():
    assert len(list(batches(Numbered(20), epochs=2, workers=2))) == 6
    assert_threads_end()


@pytest.mark.slow
def test_program_ends_quietly_with_unread_batches():
    program = """
from jaxft.data import BatchConfig, Preprocessing, open_source, train_batches
source, _ = open_source("digits:0")
config = BatchConfig(preprocessing=Preprocessing(), augment="crop_flip", batch_size=8, seed=0,
                     stage=0)
stream = train_batches(source, config, epochs=10000, workers=4)
print(next(stream).image.shape)
"""
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (process.returncode, process.stdout, process.stderr) == (0, "(8, 224, 224, 3)\n", "")
