"""Reads images in worker processes, for hosts with more cores than threads can use.

Pillow's threads hold the GIL for a part of each image, so that one process decodes only a few
thousand images per second. Worker processes share each batch: worker `w` of `n` reads the examples
whose index is `w` modulo `n`, into shared memory. Its share of a source, and of a cache of decoded
images, is therefore the same in every epoch.

- A worker is a new interpreter, not a fork: JAX's threads do not survive a fork. It does not import
  the program's `__main__` either, which needs no `if __name__ == "__main__"`.
- A worker never uses an accelerator: JAX_PLATFORMS is cpu in its environment.
- It ends with the process that started it, whichever way that ends.
- The shared memory has no name and needs no room in /dev/shm.
"""

import json
import math
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import cloudpickle
import numpy as np

from jaxft.data.concat import take
from jaxft.data.image_cache import Cached
from jaxft.data.source import Source
from jaxft.data.worker import Share, Task, aligned, arrays
from jaxft.errors import DataError

_IMAGES_AHEAD = 8  # for each worker: it never waits for the next task
_BATCHES_AHEAD = 4  # at least, since the shares of a worker in a batch differ
_END_SECONDS = 5.0  # for the workers to end after their last image, before they are killed

# The signals come first: the parent alone reacts to Ctrl-C and to a preemption.
_PROGRAM = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGTERM, signal.SIG_IGN)
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from jaxft.data.worker import main
main(int(sys.argv[2]), int(sys.argv[3]))
"""


class Rows(NamedTuple):
    """Images of a batch.

    Attributes:
      arguments: arguments of the load function for each image; the first is the example.
      num_rows: rows of the arrays; those after the images are padding.
    """

    arguments: Sequence[tuple[int, ...]]
    num_rows: int


class _Slot(NamedTuple):
    """Shared memory for a batch, and its start in the shared memory of the workers."""

    memory: mmap.mmap
    offset: int


@dataclass(eq=False)
class _Batch:
    """A batch in work.

    Attributes:
      arrays: arrays [b ...] in shared memory, such as images and targets.
      mask: False for the rows that are padding [b].
      waiting: number of workers that have not replied.
      errors: errors of images, by row.
    """

    arrays: list[np.ndarray]
    mask: np.ndarray
    waiting: int = 0
    errors: dict[int, Exception] = field(default_factory=dict)


@dataclass(eq=False)
class _Worker:
    """A worker process.

    Attributes:
      process: the process.
      connection: the socket to it.
      pending: batches that it has not finished, in the order of its replies.
      is_ready: whether it has opened the sources.
      complete: whether all images of its share are in memory.
    """

    process: subprocess.Popen[bytes]
    connection: Connection
    pending: deque[_Batch] = field(default_factory=deque)
    is_ready: bool = False
    complete: bool = False


class WorkerProcesses:
    """Worker processes that read some sources. One thread at a time may request batches."""

    def __init__(self, sources: Sequence[Source], count: int):
        self._sources, self._count = sources, count
        self._workers: list[_Worker] = []
        self._memory = _anonymous_file()
        self._size = 0
        self._free: list[_Slot] = []
        weakref.finalize(self, _end, self._workers, self._memory)

    @property
    def complete(self) -> bool:
        """Whether every worker has all images of its share in memory."""
        return bool(self._workers) and all(worker.complete for worker in self._workers)

    def prefetch(
        self,
        load: Callable[..., tuple[Any, ...]],
        rows: Callable[[int], Rows],
        steps: range,
        row_types: Sequence[tuple[str, tuple[int, ...]]],
    ) -> Generator[tuple[list[np.ndarray], np.ndarray], None, None]:
        """Yields the arrays [b ...] and the mask [b] of each step in order, prepared ahead.

        Args:
          load: function from an example of a source and further arguments to a row of each array.
          rows: returns the images of a step.
          steps: arguments of `rows`.
          row_types: dtype and shape of a row of each array.

        Raises:
          DataError: a source cannot be sent to the workers, or a worker has died.
          Exception: an error of `load`, when its batch is requested.
        """
        self._start()
        content = pickle.dumps(load)
        pending: deque[_Batch] = deque()
        for step in steps:
            rows_of_step = rows(step)
            pending.append(self._send(content, rows_of_step, row_types))
            images_ahead = _IMAGES_AHEAD * self._count
            if len(pending) > max(_BATCHES_AHEAD, images_ahead // rows_of_step.num_rows):
                yield self._result(pending.popleft())
        while pending:
            yield self._result(pending.popleft())

    def close(self) -> None:
        """Ends the processes."""
        _end(self._workers)

    def _start(self) -> None:
        """Starts the processes, unless they run, and sends each its shares of the sources."""
        if self._workers:
            return
        try:
            shares = [
                cloudpickle.dumps(
                    [
                        Share(take(source, np.arange(k, len(source), self._count)), self._count)
                        for source in self._sources
                    ]
                )
                for k in range(self._count)
            ]
        except Exception as error:  # a source may raise any type
            plain = [each.source if isinstance(each, Cached) else each for each in self._sources]
            names = " and ".join(dict.fromkeys(type(each).__name__ for each in plain))
            raise DataError(
                f"worker_processes={self._count} sends the images to other processes, and {names} "
                f"cannot be pickled ({type(error).__name__}: {error}): give the source a method "
                "__getstate__ that leaves out open files and locks, or set worker_processes=0."
            ) from error
        self._workers += [_start_worker(self._memory) for _ in shares]
        for worker, content in zip(self._workers, shares, strict=True):
            self._write(worker, content)

    def _send(
        self, load: bytes, rows: Rows, row_types: Sequence[tuple[str, tuple[int, ...]]]
    ) -> _Batch:
        """Sends the rows of a batch to the workers."""
        if not self._workers:
            raise _ended()
        types = [(dtype, (rows.num_rows, *shape)) for dtype, shape in row_types]
        sizes = [np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in types]
        slot = self._slot(sum(map(aligned, sizes)))
        memory = np.frombuffer(slot.memory, np.uint8)
        # Views keep `memory` alive: arrays of jax that share it with a batch, too.
        weakref.finalize(memory, self._free.append, slot).atexit = False
        tasks: list[list[tuple[int, tuple[int, ...]]]] = [[] for _ in self._workers]
        for row, arguments in enumerate(rows.arguments):
            tasks[arguments[0] % self._count].append((row, arguments))
        task = Task(load, slot.offset, len(memory), types, [])
        batch = _Batch(arrays(memory, task), np.arange(rows.num_rows) < len(rows.arguments))
        for array in batch.arrays:
            array[~batch.mask] = 0
        for worker, task_rows in zip(self._workers, tasks, strict=True):
            if task_rows:
                self._write(worker, pickle.dumps((*task[:-1], task_rows)))
                worker.pending.append(batch)
                batch.waiting += 1
        return batch

    def _slot(self, size: int) -> _Slot:
        """Returns memory for a batch that no array refers to."""
        fitting = [slot for slot in self._free if len(slot.memory) >= size]
        if fitting:
            slot = min(fitting, key=lambda slot: len(slot.memory))
            self._free.remove(slot)
            return slot
        size = -(-size // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
        offset, self._size = self._size, self._size + size
        os.ftruncate(self._memory, self._size)
        return _Slot(mmap.mmap(self._memory, size, offset=offset), offset)

    def _result(self, batch: _Batch) -> tuple[list[np.ndarray], np.ndarray]:
        """Waits for a batch and returns its arrays, or raises the error of its first bad image."""
        while batch.waiting:
            worker = next((each for each in self._workers if batch in each.pending), None)
            if worker is None:
                raise _ended()
            self._receive(worker)
        if batch.errors:
            raise batch.errors[min(batch.errors)]
        return batch.arrays, batch.mask

    def _receive(self, worker: _Worker) -> None:
        """Receives a worker's next reply, which may be for another batch than the caller's."""
        reply = self._read(worker)
        if not worker.is_ready:
            if reply is not None:
                self.close()
                raise DataError(
                    f"a worker process cannot open the images ({type(reply).__name__}: {reply}): "
                    "define the source in a module that other processes can import, or set "
                    "worker_processes=0."
                ) from reply
            worker.is_ready = True
            return
        batch = worker.pending.popleft()
        batch.waiting -= 1
        if isinstance(reply, tuple):
            row, error = reply
            batch.errors[row] = error
        else:
            worker.complete = reply

    def _write(self, worker: _Worker, content: bytes) -> None:
        try:
            worker.connection.send_bytes(content)
        except OSError as error:
            raise self._died(worker) from error

    def _read(self, worker: _Worker) -> Any:
        try:
            return pickle.loads(worker.connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._died(worker) from error

    def _died(self, worker: _Worker) -> DataError:
        """Returns the error of a worker whose socket is closed, and ends the other workers."""
        worker.process.kill()
        code = worker.process.wait()
        self.close()
        cause = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        return DataError(
            f"a worker process that prepares batches has died ({cause}): start the run again to "
            "resume from its last checkpoint. If the memory was full, lower worker_processes or "
            "cache_mib."
        )


def _ended() -> DataError:
    return DataError("the worker processes have ended before they read this batch.")


def _anonymous_file() -> int:
    """Returns the descriptor of a file in memory without a name, freed with its last user."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("jaxft-batches")
    with tempfile.TemporaryFile() as file:  # macOS
        return os.dup(file.fileno())


def _start_worker(memory: int) -> _Worker:
    parent, child = socket.socketpair()
    # One thread each: a host with 200 cores would start 200 threads in each of 200 workers.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with child:
        process = subprocess.Popen(
            [
                sys.executable, "-c", _PROGRAM,
                json.dumps(sys.path), str(child.fileno()), str(memory),
            ],
            stdin=subprocess.DEVNULL,
            env={**threads, **os.environ, "JAX_PLATFORMS": "cpu"},
            pass_fds=(child.fileno(), memory),
            process_group=0,  # Ctrl-C before the first line of the program
        )  # fmt: skip
    return _Worker(process, Connection(parent.detach()))


def _end(workers: list[_Worker], memory: int | None = None) -> None:
    """Ends the processes and empties the list."""
    for worker in workers:
        worker.connection.close()
    deadline = time.monotonic() + _END_SECONDS
    for worker in workers:
        try:
            worker.process.wait(max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:  # it waits for a disk
            worker.process.kill()
            worker.process.wait()
    workers.clear()
    if memory is not None:
        os.close(memory)
