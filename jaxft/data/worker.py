"""The program of a worker process; see `jaxft.data.worker_processes`.

A worker receives its share of the sources, then tasks. It writes the images and targets of a task
into shared memory and replies with None or the error of an image. It ends when the other end of its
socket is closed, which the kernel does even for a process that is killed.
"""

import mmap
import os
import pickle
import sys
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import numpy as np

from jaxft.data.source import Source
from jaxft.data.validate import without_warnings
from jaxft.errors import DataError, JaxftError

_sources: list["Share"] = []  # of this worker, in the order of `WorkerProcesses`


class Task(NamedTuple):
    """Rows of a batch that one worker prepares.

    Attributes:
      load: pickled function from its arguments to an image [h w 3] and its target.
      offset: start of the batch in the shared memory, in bytes.
      size: bytes of the batch.
      pixels: dtype and shape [b h w 3] of the images; the targets follow them.
      target_shape: shape of the targets, int32 [b] or [b k].
      rows: rows of the batch, with the arguments of `load` for each.
    """

    load: bytes
    offset: int
    size: int
    pixels: tuple[str, tuple[int, ...]]
    target_shape: tuple[int, ...]
    rows: list[tuple[int, tuple[int, ...]]]


@dataclass(frozen=True)
class Share:
    """Every `count`-th example of a source, read by its index in the whole source."""

    examples: Source
    count: int

    def __getitem__(self, index: int, /) -> Any:
        """Returns the RGB image and its target."""
        return self.examples[index // self.count]


def share(number: int) -> Share:
    """Returns this worker's share of a source; a `ProcessSource` is unpickled by this function."""
    return _sources[number]


def arrays(memory: Any, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Returns the images and targets of a task's batch as views of shared memory."""
    dtype, shape = task.pixels
    images = np.ndarray(shape, dtype, memory)
    return images, np.ndarray(task.target_shape, np.int32, memory, aligned(images.nbytes))


def aligned(size: int) -> int:
    """Returns the next multiple of 64 bytes."""
    return -(-size // 64) * 64


def main(socket: int, memory: int) -> None:
    """Serves tasks until the socket is closed.

    Args:
      socket: file descriptor of the socket.
      memory: file descriptor of the shared memory.
    """
    connection, mapped = Connection(socket), dict[int, mmap.mmap]()
    try:
        with without_warnings():  # the checks before a run have reported them
            connection.send_bytes(pickle.dumps(_receive_sources(connection)))
            while True:
                task = Task(*pickle.loads(connection.recv_bytes()))
                if task.offset not in mapped:
                    mapped[task.offset] = mmap.mmap(memory, task.size, offset=task.offset)
                connection.send_bytes(pickle.dumps(_run(task, mapped[task.offset])))
    except (EOFError, OSError):  # the parent has ended
        pass
    sys.stdout.flush()
    os._exit(0)  # threads of a source must not keep the process


def _receive_sources(connection: Connection) -> Exception | None:
    content = connection.recv_bytes()
    try:
        _sources.extend(pickle.loads(content))
    except Exception as error:  # of the import of the source's module
        return _portable(error)
    return None


def _run(task: Task, memory: mmap.mmap) -> tuple[int, Exception] | bool:
    """Prepares a task; returns whether all images are in memory, or a row and its error."""
    images, targets = arrays(memory, task)
    load = pickle.loads(task.load)
    for row, arguments in task.rows:
        try:
            images[row], targets[row] = load(*arguments)
        except Exception as error:
            return row, _portable(error)
    return all(getattr(source.examples, "complete", True) for source in _sources)


def _portable(error: Exception) -> Exception:
    """Returns an error that can be pickled, with its traceback as a note unless it is jaxft's."""
    if not isinstance(error, JaxftError):
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return DataError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return error
