"""The program of a worker process; see `jaxft.data.worker_processes`.

A worker receives its share of the sources, then tasks. It writes the rows of a task into shared
memory and replies with None or the error of an image. It ends when the other end of its socket is
closed, which the kernel does even for a process that is killed.
"""

import mmap
import os
import pickle
import sys
import traceback
from collections.abc import Iterable, Sequence
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
      load: pickled function from its arguments to a row of each array.
      offset: start of the batch in the shared memory, in bytes.
      size: bytes of the batch.
      arrays: dtype and shape [b ...] of each array, such as images and targets.
      rows: rows of the batch, with the arguments of `load` for each.
    """

    load: bytes
    offset: int
    size: int
    arrays: Sequence[tuple[str, tuple[int, ...]]]
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


def arrays(memory: Any, task: Task) -> list[np.ndarray]:
    """Returns the arrays of a task's batch as views of shared memory."""
    views, offset = list[np.ndarray](), 0
    for dtype, shape in task.arrays:
        views.append(np.ndarray(shape, dtype, memory, offset))
        offset += aligned(views[-1].nbytes)
    return views


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
    views = arrays(memory, task)
    load = pickle.loads(task.load)
    for row, arguments in task.rows:
        try:
            write_row(views, row, load(*arguments))
        except Exception as error:
            return row, _portable(error)
    return all(getattr(source.examples, "complete", True) for source in _sources)


def write_row(arrays: Sequence[np.ndarray], row: int, values: Iterable[Any]) -> None:
    """Writes a row of each array."""
    for array, value in zip(arrays, values, strict=True):
        array[row] = value


def _portable(error: Exception) -> Exception:
    """Returns an error that can be pickled, with its traceback as a note unless it is jaxft's."""
    if not isinstance(error, JaxftError):
        error.add_note(f"In a worker process:\n{traceback.format_exc()}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return DataError(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    return error
