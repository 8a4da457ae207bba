"""The cache of decoded images: the same pixels, fewer reads, and never more bytes than allowed."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image
from reference import sample

from jaxft.data import Preprocessing, train_batches
from jaxft.data.image_cache import Cached

SIZES = [(8, 8), (10, 6), (30, 40), (5, 5), (12, 7)]
BYTES = [4 * h * w for h, w in SIZES]


class Counted:
    """A source that counts how often each image is read."""

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
    ("max_bytes", "kept"),
    [
        (0, []),
        (255, [1]),
        (BYTES[0] + BYTES[1] + BYTES[3], [0, 1, 3]),  # a large image keeps out no smaller ones
        (sum(BYTES) - 1, [0, 1, 2, 3]),
        (sum(BYTES), [0, 1, 2, 3, 4]),
    ],
)
def test_what_fits_is_read_once(max_bytes, kept):
    source = Counted()
    cached = Cached(source, max_bytes)
    assert (len(cached), cached.classes) == (5, ("only",))
    np.testing.assert_array_equal(cached.targets, source.targets)
    for _ in range(3):
        for index, size in enumerate(SIZES):
            image, target = cached[index]
            np.testing.assert_array_equal(image, sample(*size))
            assert target == index % 3
    assert [k for k, reads in enumerate(source.reads) if reads == 1] == kept
    assert all(reads in (1, 3) for reads in source.reads)
    assert all("exif" not in cached[k][0].info for k in kept)


def test_threads_share_it():
    source, together = Counted(), threading.Barrier(4)
    cached = Cached(source, sum(BYTES))

    def read(_):
        together.wait()
        return [cached[k][0].tobytes() for k in range(5)]

    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(read, range(4)))
    assert all(m == [sample(*size).tobytes() for size in SIZES] for m in made)
    # Several may have read an image at once, but it was paid for once, or not all would fit.
    before = list(source.reads)
    read_again = [cached[k] for k in range(5)]
    assert len(read_again) == 5
    assert source.reads == before


@pytest.mark.parametrize("max_bytes", [0, 2000, 10**6])
def test_batches_are_the_same(max_bytes):
    def batches(source):
        return [
            batch.image.tobytes()
            for batch in train_batches(
                source,
                Preprocessing(image_size=6, resize_size=7),
                augment="trivialaugment",
                batch_size=2,
                seed=0,
                stage=0,
                epochs=4,
                workers=2,
            )
        ]

    assert batches(Cached(Counted(), max_bytes)) == batches(Counted())


def test_an_opened_file_is_kept_as_plain_pixels(tmp_path):
    sample(20, 30).save(tmp_path / "image.jpg", comment="words")

    class OneFile(Counted):
        def __getitem__(self, index):
            image = Image.open(tmp_path / "image.jpg")
            image.load()
            return image, 0

    cached = Cached(OneFile(), 10**6)
    first, second = cached[0][0], cached[0][0]
    np.testing.assert_array_equal(first, second)
    assert type(second) is Image.Image
    assert second.info == {}
