"""Seconds that a run spends in validation, compilation, checkpoints and cached features."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Phase = Literal["validation", "compile", "checkpoint", "feature"]


class PhaseClock:
    """Adds up the seconds in which the run's main thread is busy with, or waits for, a phase."""

    def __init__(self) -> None:
        self._seconds = dict.fromkeys(get_args(Phase), 0.0)

    @contextmanager
    def measure(self, phase: Phase) -> Iterator[None]:
        """Adds the duration of the block to the phase."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[phase] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Returns the seconds since the last call as fields of a row, `<phase>_seconds`."""
        taken = {f"{phase}_seconds": seconds for phase, seconds in self._seconds.items()}
        self._seconds = dict.fromkeys(self._seconds, 0.0)
        return taken
