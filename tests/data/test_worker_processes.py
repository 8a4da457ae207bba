"""Worker processes read the same batches as threads, pass on errors, and end with their parent."""

import hashlib
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing
from functools import partial
from itertools import islice

import jax
import numpy as np
import pytest
from PIL import Image

from jaxft.data import (
    BatchConfig,
    Cached,
    Preprocessing,
    arrays,
    eval_batches,
    open_source,
    train_batches,
)
from jaxft.data.batches import train_view_loader
from jaxft.data.process_source import in_processes
from jaxft.errors import DataError

SIZE = Preprocessing(image_size=8, resize_size=10)


def digests(batches):
    """Digests of the batches, read after all of them are made."""
    batches = list(batches)
    leaves = map(jax.tree.leaves, batches)
    return [hashlib.sha256(b"".join(a.tobytes() for a in batch)).hexdigest() for batch in leaves]


def config(**changes):
    options = {"augment": "crop_flip", "batch_size": 8, "seed": 0, "stage": 0, **changes}
    return BatchConfig(preprocessing=SIZE, **options)


class TwoPartError(Exception):
    """An error that cannot be unpickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Failing:
    """Grey images, some of which raise an error."""

    classes = ("a", "b")
    targets = (np.arange(20) % 2).astype(np.int32)

    def __init__(self, errors):
        self.errors = errors

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        if index in self.errors:
            raise self.errors[index]()
        return Image.new("RGB", (12, 10), (index,) * 3), int(self.targets[index])


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Pairs of a source and the same source in two worker processes, by kind."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("ant", "bee"):
        (folder / name).mkdir()
        for k in range(13):
            pixels = rng.integers(0, 256, (12, 15 + k, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    images = open_source(f"folder:{folder}").train
    pixels = rng.normal(size=(21, 8, 8, 3)).astype(np.float32)
    plain = {
        "folder": images,
        "cached": Cached(images, 10**6),
        "partly cached": Cached(images, 10**4),
        "floats": arrays(pixels, np.arange(21) % 3, ["a", "b", "c"], values="normalized"),
        "labels": arrays(
            rng.integers(0, 256, (21, 9, 9, 3), np.uint8),
            rng.integers(0, 2, (21, 3)),
            ["a", "b", "c"],
        ),
        "one": images.take(np.arange(1)),
        "unreadable": Failing(
            {k: partial(DataError, f"image {k} cannot be read") for k in (12, 17)}
        ),
        "buggy": Failing({0: partial(KeyError, "missing")}),
        "unpicklable error": Failing({0: partial(TwoPartError, "one", "two")}),
    }
    pooled = in_processes(list(plain.values()), 2)
    yield {kind: pair for kind, *pair in zip(plain, plain.values(), pooled, strict=True)}
    pooled[0].workers.close()


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("folder", {}),
        ("folder", {"augment": "randaugment", "balanced": True}),
        ("folder", {"augment": "shift", "num_views": 2, "drop_last": True}),
        ("folder", {"rows": 12, "last_rows": 6, "shard": (1, 2)}),
        ("folder", {"batch_size": 1}),
        ("folder", {"augment": "jitter", "augment_on_device": True, "rows": 12, "last_rows": 6}),
        ("cached", {}),
        ("partly cached", {}),
        ("floats", {"augment": "flip"}),
        ("labels", {}),
        ("one", {}),
    ],
)
@pytest.mark.slow
def test_worker_processes_train_like_threads(sources, kind, changes):
    source, pooled = sources[kind]
    options = config(**changes)
    expected = digests(train_batches(source, options, epochs=3, workers=2))
    assert digests(train_batches(pooled, options, epochs=3)) == expected
    resumed = train_batches(pooled, options, epochs=3, first_epoch=1)
    assert digests(resumed) == expected[len(expected) // 3 :]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "floats", "labels", "one"])
def test_worker_processes_evaluate_like_threads(sources, kind):
    source, pooled = sources[kind]
    expected = digests(eval_batches(source, SIZE, batch_size=8, workers=2))
    assert digests(eval_batches(pooled, SIZE, batch_size=8, workers=2)) == expected
    one, two = (
        digests(eval_batches(each, SIZE, batch_size=8, workers=0, load=partial(load, view=3)))
        for each in (source, pooled)
        for load in [train_view_loader(each, SIZE, "flip", seed=0, stage=0)]
    )
    assert one == two


@pytest.mark.slow
def test_worker_processes_serve_interleaved_streams(sources):
    """As validation during an epoch does."""
    source, pooled = sources["folder"]
    expected = digests(train_batches(source, config(), epochs=3))
    with closing(train_batches(pooled, config(), epochs=9)) as stream:
        before = digests(islice(stream, 3))
        between = digests(eval_batches(pooled, SIZE, batch_size=4, workers=0))
        after = digests(islice(stream, 4))
    assert before + after == expected[:7]
    assert between == digests(eval_batches(source, SIZE, batch_size=4, workers=0))
    assert digests(train_batches(pooled, config(), epochs=3)) == expected  # of a closed stream


@pytest.mark.slow
def test_worker_processes_reuse_memory(sources):
    _, pooled = sources["folder"]
    workers = pooled.workers
    for _ in train_batches(pooled, config(), epochs=3):
        pass
    size = workers._size
    for _ in train_batches(pooled, config(), epochs=20):
        pass
    assert workers._size == size


@pytest.mark.slow
def test_worker_processes_raise_the_first_error_of_a_batch(sources):
    _, pooled = sources["unreadable"]
    for _ in range(2):  # the workers survive
        stream = eval_batches(pooled, SIZE, batch_size=10, workers=0)
        assert next(stream).target.shape == (10,)
        with pytest.raises(DataError, match=r"^image 12 cannot be read$"):
            next(stream)


@pytest.mark.slow
def test_worker_processes_raise_other_errors(sources):
    with pytest.raises(KeyError, match="missing") as caught:
        next(eval_batches(sources["buggy"][1], SIZE, batch_size=10, workers=0))
    assert "raise self.errors[index]()" in caught.value.__notes__[0]
    with pytest.raises(DataError, match="TwoPartError: one and two"):
        next(eval_batches(sources["unpicklable error"][1], SIZE, batch_size=10, workers=0))


def test_worker_processes_name_a_source_that_cannot_be_pickled():
    class Locked(Failing):
        def __init__(self):
            self.lock = threading.Lock()

    (pooled,) = in_processes([Cached(Locked(), 0)], 2)
    with pytest.raises(
        DataError, match=r"worker_processes=2 .* Locked cannot be pickled \(TypeError.*__getstate__"
    ):
        next(eval_batches(pooled, SIZE, batch_size=10, workers=0))


@pytest.mark.slow
def test_worker_processes_report_a_dead_worker(sources):
    (pooled,) = in_processes([sources["folder"][0]], 2)
    stream = train_batches(pooled, config(), epochs=99)
    next(stream)
    other = train_batches(pooled, config(), epochs=99)
    next(other)
    os.kill(pooled.workers._workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(DataError, match=r"has died \(SIGKILL\): start the run again"):
        digests(stream)
    assert pooled.workers._workers == []
    with pytest.raises(DataError, match="have ended before they read this batch"):
        digests(other)
    assert len(digests(train_batches(pooled, config(), epochs=1))) == 3  # new processes
    pooled.workers.close()


PROGRAM = """
import os, signal, sys
import jax, numpy as np
from PIL import Image
from jaxft.data import BatchConfig, Preprocessing, train_batches
from jaxft.data.process_source import in_processes

class Here:
    classes, targets = ("a",), np.zeros(20, np.int32)
    def __len__(self): return 20
    def __getitem__(self, index):
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        return Image.new("RGB", (8, 8), (index,) * 3), 0

jax.devices()  # starts threads
config = BatchConfig(preprocessing=Preprocessing(image_size=8, resize_size=None), augment="none",
                     batch_size=10, seed=0, stage=0)
stream = train_batches(in_processes([Here()], 2)[0], config, epochs=10**6)
print(next(stream).image.shape, flush=True)
if sys.argv[1] == "end":
    sys.exit()
for _ in stream:
    pass
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["end", "SIGKILL", "SIGINT", "SIGTERM"])
def test_worker_processes_end_with_their_parent(end):
    """Of a script without `if __name__ == "__main__"`, whose source is defined in it."""
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", PROGRAM, end],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "(10, 8, 8, 3)\n"
    if end == "end":
        pass
    elif end == "SIGKILL":
        process.kill()
    else:
        os.killpg(process.pid, signal.Signals[end])  # as a terminal and a job scheduler do
    # The pipes close when the last process has ended.
    _, errors = process.communicate(timeout=120)
    assert errors.count("Traceback") == (end == "SIGINT")
    assert process.returncode == (0 if end == "end" else -signal.Signals[end])
