"""A source whose batches are read by worker processes."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxft.data.fingerprint import identity
from jaxft.data.source import Source, Target, pixel_type
from jaxft.data.worker import Share, share
from jaxft.data.worker_processes import WorkerProcesses


class ProcessSource:
    """A `Source` whose batches are read by worker processes; see `in_processes`."""

    def __init__(self, source: Source, number: int, workers: "WorkerProcesses"):
        self._source, self._number, self.workers = source, number, workers

    def __reduce__(self) -> tuple[Callable[[int], Share], tuple[int]]:
        # In a worker, `load` reads from the worker's share of the source.
        return share, (self._number,)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the source."""
        return self._source.classes

    @property
    def targets(self) -> np.ndarray:
        """Targets of the source."""
        return self._source.targets

    @property
    def pixel_type(self) -> np.dtype[Any]:
        """Dtype of the source's images."""
        return pixel_type(self._source)

    @property
    def complete(self) -> bool:
        """Whether the workers have all images in memory."""
        return self.workers.complete

    def identity(self, index: int, /) -> str | bytes:
        """Returns the identity of the example in the source."""
        return identity(self._source, index)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int, /) -> tuple[Any, Target]:
        """Returns the RGB image and its target, read in this process."""
        return self._source[index]


def in_processes(sources: Sequence[Source], processes: int) -> list[ProcessSource]:
    """Returns the sources, whose batches are then read by worker processes that they share.

    The processes start with the first batch. They end when the sources are no longer in use, or
    with `source.workers.close()`.

    Args:
      sources: sources that can be pickled, also ones that are defined in `__main__`.
      processes: number of worker processes.
    """
    workers = WorkerProcesses(sources, processes)
    return [ProcessSource(source, number, workers) for number, source in enumerate(sources)]
