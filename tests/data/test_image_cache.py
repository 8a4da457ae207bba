"""`Cached` returns the same pixels with fewer reads, within its memory limit."""

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from reference import sample

from jaxft.data import BatchConfig, Preprocessing, train_batches
from jaxft.data.image_cache import Cached

SIZES = [(8, 8), (10, 6), (30, 40), (5, 5), (12, 7)]
BYTES = [4 * h * w for h, w in SIZES]


class CountingSource:
    """A source that counts the reads of each image."""

    classes = ("only",)

    def __init__(self):
        self.targets = np.arange(len(SIZES), dtype=np.int32) % 3
        self.reads = [0] * len(SIZES)

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        self.reads[index] += 1
        image = sample(*SIZES[index])
        image.info["exif"] = b"many bytes"
        return image, int(self.targets[index])


@pytest.mark.parametrize(
    ("max_bytes", "cached_indices"),
    [
        (0, []),
        (255, [1]),
        (BYTES[0] + BYTES[1] + BYTES[3], [0, 1, 3]),  # small images after one that is too large
        (sum(BYTES) - 1, [0, 1, 2, 3]),
        (sum(BYTES), [0, 1, 2, 3, 4]),
    ],
)
def test_cached_reads_images_once_up_to_max_bytes(max_bytes, cached_indices):
    source = CountingSource()
    cached = Cached(source, max_bytes)
    assert (len(cached), cached.classes) == (5, ("only",))
    np.testing.assert_array_equal(cached.targets, source.targets)
    for _ in range(3):
        for index, size in enumerate(SIZES):
            image, target = cached[index]
            np.testing.assert_array_equal(image, sample(*size))
            assert target == index % 3
    assert [k for k, reads in enumerate(source.reads) if reads == 1] == cached_indices
    assert all(reads in (1, 3) for reads in source.reads)
    assert all("exif" not in cached[k][0].info for k in cached_indices)


def test_cached_is_thread_safe():
    source, barrier = CountingSource(), threading.Barrier(4)
    cached = Cached(source, sum(BYTES))

    def read():
        return [cached[k][0].tobytes() for k in range(5)]

    def read_together(_):
        barrier.wait()
        return read()

    with ThreadPoolExecutor(4) as pool:
        by_thread = list(pool.map(read_together, range(4)))
    assert all(pixels == [sample(*size).tobytes() for size in SIZES] for pixels in by_thread)
    # Threads may read an image at the same time, but its size must be counted once, or not all
    # images would fit.
    reads = list(source.reads)
    read()
    assert source.reads == reads


@pytest.mark.parametrize("max_bytes", [0, 2000, 10**6])
def test_cached_leaves_train_batches_unchanged(max_bytes):
    def batches(source):
        return [
            batch.image.tobytes()
            for batch in train_batches(
                source,
                BatchConfig(
                    preprocessing=Preprocessing(image_size=6, resize_size=7),
                    augment="trivialaugment",
                    batch_size=2,
                    seed=0,
                    stage=0,
                ),
                epochs=4,
                workers=2,
            )
        ]

    assert batches(Cached(CountingSource(), max_bytes)) == batches(CountingSource())


def test_cached_drops_file_metadata(tmp_path):
    sample(20, 30).save(tmp_path / "image.jpg", comment="words")

    class OneFile(CountingSource):
        def __getitem__(self, index):
            image = Image.open(tmp_path / "image.jpg")
            image.load()
            return image, 0

    cached = Cached(OneFile(), 10**6)
    first, second = cached[0][0], cached[0][0]
    np.testing.assert_array_equal(first, second)
    assert type(second) is Image.Image
    assert second.info == {}


def test_cached_take_divides_the_memory():
    cached = Cached(CountingSource(), sum(BYTES))
    for index in range(5):
        cached[index]
    part = cached.take(np.array([1, 3]))
    assert [len(cached), len(part), part.complete] == [5, 2, False]
    assert part._free_bytes == sum(BYTES) * 2 // 5
    np.testing.assert_array_equal(part[1][0], sample(*SIZES[3]))


def test_cached_pickles_no_images():
    cached = Cached(CountingSource(), sum(BYTES))
    cached[2]
    loaded = pickle.loads(pickle.dumps(cached))
    assert (loaded._images, loaded._free_bytes) == ({}, sum(BYTES))
    np.testing.assert_array_equal(loaded[2][0], cached[2][0])
