"""Shows the progress of long work: a bar on a terminal, one line in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Lock
from typing import Literal

from rich.console import Console as Terminal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Unit = Literal["images", "batches", "files", "bytes"]

_BAR_SECONDS = 1.0  # before a bar appears, so that short work does not flicker
_LINE_SECONDS = 10.0  # before the line in a log

_terminal: ContextVar[Terminal | None] = ContextVar("terminal", default=None)


@contextmanager
def show_progress_on(terminal: Terminal | None) -> Iterator[None]:
    """Shows work on a terminal or in a log, if `track` counts it in this context; None hides it."""
    token = _terminal.set(terminal)
    try:
        yield
    finally:
        _terminal.reset(token)


@contextmanager
def track(
    text: str, total: int | None, unit: Unit = "images", *, terminal: Terminal | None = None
) -> Iterator["Work"]:
    """Tracks work whose progress is shown once it has lasted some seconds.

    Args:
      text: name of the work.
      total: number of units; None if it is not known yet.
      unit: kind of units.
      terminal: where to show it, instead of the terminal of `show_progress_on`.
    """
    work = Work(text, total, unit, terminal or _terminal.get())
    try:
        yield work
    finally:
        work.close()


class Work:
    """Thread-safe counter of the finished units of some work."""

    def __init__(
        self,
        text: str,
        total: int | None,
        unit: Unit,
        terminal: Terminal | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._text, self._total, self._unit = text, total, unit
        self._terminal, self._clock, self._began = terminal, clock, clock()
        self._done, self._lock = 0, Lock()
        self._bar: Progress | None = None
        self._has_line = False

    def advance(self, count: int = 1) -> None:
        """Counts further units."""
        with self._lock:
            self._done += count
            self._show()

    def update(self, done: int, total: int | None) -> None:
        """Sets the numbers of units."""
        with self._lock:
            self._done, self._total = done, total
            self._show()

    def close(self) -> None:
        """Removes the bar."""
        if self._bar:
            self._bar.stop()

    def _show(self) -> None:
        if self._terminal is None or self._has_line:
            return
        seconds = self._clock() - self._began
        if not self._terminal.is_terminal:
            if seconds >= _LINE_SECONDS:
                self._has_line = True
                with suppress(OSError):  # such as a full disk: the work continues
                    self._terminal.print(
                        self._line(seconds),
                        markup=False, highlight=False, emoji=False, soft_wrap=True,
                    )  # fmt: skip
            return
        if self._bar is None and seconds >= _BAR_SECONDS:
            byte_columns = (DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(
                TextColumn("  {task.description}", markup=False),
                BarColumn(bar_width=None),
                *(byte_columns if self._unit == "bytes" else (MofNCompleteColumn(),)),
                TimeRemainingColumn(),
                console=self._terminal,
                transient=True,
            )
            self._bar.add_task(self._text)
            self._bar.start()
        if self._bar:
            self._bar.update(self._bar.task_ids[0], completed=self._done, total=self._total)

    def _line(self, seconds: float) -> str:
        scale, unit = (1e6, "MB") if self._unit == "bytes" else (1, self._unit)
        count = f"{self._done / scale:,.0f} {unit}"
        if self._total is None or not self._done:
            return f"{self._text}: {count} after {seconds:.0f} s"
        count = f"{self._done / scale:,.0f} of {self._total / scale:,.0f} {unit}"
        left = seconds * (self._total - self._done) / self._done
        time_left = f"{left:.0f} s" if left < 90 else f"{left / 60:,.0f} min"
        return f"{self._text}: {count} after {seconds:.0f} s, about {time_left} left"
