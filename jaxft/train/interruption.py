"""Signals that ask a run to stop: it saves where it is, and says so."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxft.errors import JaxftError


class InterruptedRunError(JaxftError):
    """A run was asked to stop and has saved its position; `signal` is who asked."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.signal = number


class Interruption:
    """Whether the run has been asked to stop."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def ask(self, number: int, _: FrameType | None = None) -> None:
        """As a signal handler. A second SIGINT does not wait for anything."""
        if number == signal.SIGINT and self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Catches SIGTERM, which machines get that are about to be taken away, and SIGINT, Ctrl-C.

    Signals reach Python's main thread alone: in any other, nothing is caught.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, interruption.ask) for number in numbers}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's
