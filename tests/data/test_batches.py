"""Batches: which examples, in which order, whoever prepares them; and how they end."""

import hashlib
import itertools
import subprocess
import sys
import threading
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from jaxft.data import (
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


@pytest.mark.parametrize("augment", ["none", "crop_flip", "shift"])
def test_same_batches_for_any_number_of_workers_and_resumed(augment):
    source, _ = open_source("digits:0-1", shots=10)
    made = {
        workers: digests(batches(source, augment=augment, epochs=3, workers=workers))
        for workers in (0, 1, 4)
    }
    assert len(made[0]) == 3 * steps_per_epoch(source, 8) == 9
    assert made[0] == made[1] == made[4]
    for epoch in range(4):
        resumed = batches(source, augment=augment, epochs=3, first_epoch=epoch, workers=2)
        assert digests(resumed) == made[0][3 * epoch :]


def test_augmentation_belongs_to_the_example_not_to_its_place():
    source, _ = open_source("digits:0", shots=12)

    def views(**changes):
        made = batches(source, augment="shift", **changes)
        return sorted(image.tobytes() for batch in made for image in batch.image[batch.mask])

    assert views() == views(batch_size=5) == views(batch_size=5, workers=3)
    for change in ({"seed": 1}, {"stage": 1}, {"first_epoch": 1, "epochs": 2}):
        assert views() != views(**change)


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
        if thread.name.startswith("grain"):
            thread.join(timeout=60)
            assert not thread.is_alive()


def test_threads_end_after_an_early_close():
    with closing(batches(Numbered(64), epochs=1000, workers=4)) as stream:
        assert next(stream).mask.all()
        assert any(thread.name.startswith("grain") for thread in threading.enumerate())
    assert_threads_end()
    assert next(stream, None) is None


def test_threads_end_with_the_stage():
    assert len(list(batches(Numbered(20), epochs=2, workers=2))) == 6
    assert_threads_end()


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
