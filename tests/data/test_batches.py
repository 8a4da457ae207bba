"""Batches: which examples, in which order, whoever prepares them; and how they end."""

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
    Preprocessing,
    eval_batches,
    open_source,
    steps_per_epoch,
    train_batches,
)
from jaxft.errors import DataError

PLAIN = Preprocessing(image_size=8, resize_size=None)


class Numbered:
    """A source of `count` gray images whose level is their number; `broken` ones do not read."""

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
    options = {"augment": "none", "batch_size": 8, "seed": 0, "stage": 0, "epochs": 1, "workers": 0}
    return train_batches(source, preprocessing, **{**options, **changes})


def digests(batches):
    return [hashlib.sha256(b"".join(a.tobytes() for a in batch)).hexdigest() for batch in batches]


def numbers(batches):
    return [batch.image[batch.mask][:, 0, 0, 0].tolist() for batch in batches]


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (7, 1), (8, 1), (9, 2), (24, 3)])
def test_every_example_once_and_the_rest_is_masked(count, steps):
    source = Numbered(count)
    assert steps_per_epoch(source, 8) == steps
    for made in (
        list(batches(source)),
        list(eval_batches(source, PLAIN, batch_size=8, workers=0)),
    ):
        assert len(made) == steps
        assert sorted(itertools.chain(*numbers(made))) == list(range(count))
        for batch in made:
            image, target, mask = batch
            assert (image.shape, image.dtype) == ((8, 8, 8, 3), np.uint8)
            assert (target.shape, target.dtype) == ((8,), np.int32)
            assert (mask.shape, mask.dtype) == ((8,), np.bool_)
            np.testing.assert_array_equal(target[mask], image[mask][:, 0, 0, 0] % 2)
            assert not image[~mask].any()
            assert not target[~mask].any()
        full = np.concatenate([batch.mask for batch in made])
        np.testing.assert_array_equal(full, np.arange(steps * 8) < count)  # padding comes last


def test_evaluation_keeps_the_order():
    made = numbers(eval_batches(Numbered(20), PLAIN, batch_size=8, workers=2))
    assert list(itertools.chain(*made)) == list(range(20))


def test_order_depends_on_seed_stage_and_epoch():
    source = Numbered(30)
    order = list(itertools.chain(*numbers(batches(source, epochs=2))))
    first, second = order[:30], order[30:]
    others = [
        list(itertools.chain(*numbers(batches(source, **change))))
        for change in ({"seed": 1}, {"stage": 1})
    ]
    assert sorted(first) == sorted(second) == list(range(30))
    assert len({tuple(o) for o in (first, second, *others)}) == 4


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("augment", get_args(Augment))
def test_same_batches_for_any_number_of_workers(augment, balanced):
    source, _ = open_source("digits:0-1", shots=10)
    options = {"augment": augment, "balanced": balanced, "epochs": 3}
    made = {workers: digests(batches(source, workers=workers, **options)) for workers in (0, 2, 4)}
    assert len(made[0]) == 3 * steps_per_epoch(source, 8) == 9
    assert made[0] == made[2] == made[4]
    assert len(set(made[0])) == 9


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("balanced", [False, True])
def test_same_batches_after_a_resume_at_any_step(workers, drop_last, balanced):
    source, _ = open_source("digits:0-1", shots=10)
    options = {"augment": "trivialaugment", "epochs": 3, "balanced": balanced}
    options |= {"drop_last": drop_last}
    whole = digests(batches(source, **options))
    steps = steps_per_epoch(source, 8, drop_last=drop_last)
    for step in range(len(whole) + 1):
        epoch, position = divmod(step, steps)
        resumed = batches(
            source, first_epoch=epoch, first_step=position, workers=workers, **options
        )
        assert digests(resumed) == whole[step:]


def joined(shards):
    """Batches of all processes, their parts one after another."""
    return [
        Batch(*map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*shards, strict=True)
    ]


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_processes_make_parts_of_the_same_batches(count):
    source, _ = open_source("digits:0-1", shots=10)  # 2 batches of 8 and one of 4
    shards = [(index, count) for index in range(count)]
    for make in (
        lambda shard: batches(source, augment="jitter", epochs=2, workers=2, shard=shard),
        lambda shard: batches(source, augment="shift", balanced=True, shard=shard),
        lambda shard: eval_batches(source, PLAIN, batch_size=8, workers=2, shard=shard),
    ):
        made = [list(make(shard)) for shard in shards]
        assert {len(batch.mask) for part in made for batch in part} == {8 // count}
        assert digests(joined(made)) == digests(make((0, 1)))


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_more_rows_than_examples_are_padding_at_the_end(count):
    source, _ = open_source("digits:0-1", shots=10)  # 3 batches of 6 and one of 2
    for make in (
        lambda **changes: batches(source, batch_size=6, augment="shift", **changes),
        lambda **changes: eval_batches(source, PLAIN, batch_size=6, workers=2, **changes),
    ):
        shards = [list(make(rows=8, shard=(index, count))) for index in range(count)]
        assert {len(batch.mask) for part in shards for batch in part} == {8 // count}
        plain = list(make())
        padded = [Batch(*(np.pad(a, [(0, 2)] + [(0, 0)] * (a.ndim - 1)) for a in b)) for b in plain]
        assert len(plain) == 4
        assert digests(joined(shards)) == digests(padded)


def test_a_process_decodes_no_more_than_its_part():
    read = []

    class Noted(Numbered):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    made = list(batches(Noted(20), shard=(1, 4)))
    assert sorted(read) == sorted(itertools.chain(*numbers(made)))
    assert len(read) == 6  # rows 2 and 3 of two full batches, and of the last, which has 4


@pytest.mark.slow
def test_two_operating_system_processes(tmp_path):
    program = """
import sys
import numpy as np
from jaxft.data import Preprocessing, open_source, train_batches
source, _ = open_source("digits:0-1", shots=10)
made = train_batches(source, Preprocessing(image_size=8, resize_size=None), augment="shift",
                     batch_size=8, seed=0, stage=0, epochs=2, workers=2,
                     shard=(int(sys.argv[1]), 2))
arrays = {f"{name}{k}": a for k, batch in enumerate(made) for name, a in zip("itm", batch)}
np.savez(sys.argv[2], **arrays)
"""
    files = [tmp_path / "0.npz", tmp_path / "1.npz"]
    running = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", program, str(k), str(file)])
        for k, file in enumerate(files)
    ]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
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
def test_wrong_shards(rows, shard, message):
    with pytest.raises(DataError, match=message):
        batches(Numbered(20), rows=rows, shard=shard)
    with pytest.raises(DataError, match=message):
        eval_batches(Numbered(20), PLAIN, batch_size=8, workers=0, rows=rows, shard=shard)


@pytest.mark.parametrize(("count", "steps"), [(8, 1), (9, 1), (15, 1), (16, 2)])
def test_drop_last_leaves_out_what_would_be_padded(count, steps):
    source = Numbered(count)
    made = list(batches(source, drop_last=True, epochs=2))
    assert len(made) == 2 * steps_per_epoch(source, 8, drop_last=True) == 2 * steps
    assert all(batch.mask.all() for batch in made)
    kept = numbers(batches(source, drop_last=True))
    assert kept == numbers(batches(source))[:steps]
    assert len(set(itertools.chain(*kept))) == 8 * steps


def test_drop_last_of_too_few():
    with pytest.raises(DataError, match="nothing of 7 images in batches of 8: set batch_size to a"):
        batches(Numbered(7), drop_last=True)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc")
def test_memory_does_not_grow():
    source, _ = open_source("digits", shots=20)
    larger = Preprocessing(image_size=32, resize_size=32)
    stream = batches(
        source,
        preprocessing=larger,
        batch_size=32,
        augment="shift_flip",
        epochs=50,
        workers=2,
    )
    seen = []
    for step, _ in enumerate(stream):
        if step % (5 * steps_per_epoch(source, 32)) == 0:
            gc.collect()
            seen.append(resident_bytes())
    assert len(seen) == 10
    # To keep the batches of the 45 epochs after the first 5 would take 31 MB.
    assert max(seen) - max(seen[:2]) < 8e6


def test_augmentation_belongs_to_the_example_not_to_its_place():
    source, _ = open_source("digits:0", shots=12)

    def views(**changes):
        made = batches(source, augment="shift", **changes)
        return sorted(image.tobytes() for batch in made for image in batch.image[batch.mask])

    assert views() == views(batch_size=5) == views(batch_size=5, workers=3)
    for change in ({"seed": 1}, {"stage": 1}, {"first_epoch": 1, "epochs": 2}):
        assert views() != views(**change)


def test_balanced_epochs_draw_rare_classes_again_in_other_views():
    source, _ = open_source("digits:0-1", shots=20)
    zeros, ones = (np.flatnonzero(source.targets == k) for k in (0, 1))
    rare = source.take(np.concatenate([zeros, ones[:2]]))
    made = list(batches(rare, augment="shift", balanced=True, epochs=4))
    assert sum(batch.mask.sum() for batch in made) == 4 * len(rare)
    ones = [image.tobytes() for b in made for image in b.image[b.mask & (b.target == 1)]]
    assert len(ones) > 20  # of 2 images; without balance it would be 8
    assert len(set(ones)) > 6


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_error_reaches_the_consumer(workers):
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


def test_threads_end_after_an_early_close():
    with closing(batches(Numbered(64), epochs=1000, workers=4)) as stream:
        assert next(stream).mask.all()
        assert any(thread.name.startswith("jaxft-data") for thread in threading.enumerate())
    assert_threads_end()
    assert next(stream, None) is None


def test_threads_end_with_the_stage():
    assert len(list(batches(Numbered(20), epochs=2, workers=2))) == 6
    assert_threads_end()


@pytest.mark.slow
def test_program_ends_quietly_with_batches_left():
    program = """
from jaxft.data import Preprocessing, open_source, train_batches
source, _ = open_source("digits:0")
stream = train_batches(source, Preprocessing(), augment="crop_flip", batch_size=8, seed=0,
                       stage=0, epochs=10000, workers=4)
print(next(stream).image.shape)
"""
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "(8, 224, 224, 3)\n", "")
