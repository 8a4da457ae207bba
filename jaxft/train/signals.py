"""SIGTERM and SIGINT: before training they end a run at once, later once its step is saved."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from jaxft.errors import InterruptedRunError


class Interruption:
    """Records whether a signal has asked the run to stop.

    Attributes:
      signal: number of the signal; None before one.
      waits: whether a signal waits until the run has saved its step. Otherwise it raises
        KeyboardInterrupt at once.
      resumes: whether the workdir holds a checkpoint to continue from.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.waits = False
        self.resumes = False

    def ask(self, number: int, _: FrameType | None = None) -> None:
        """Handles a signal. A second SIGINT does not wait for anything."""
        again = self.signal is not None
        self.signal = number
        if not self.waits or (again and number == signal.SIGINT):
            raise KeyboardInterrupt

    def wait(self) -> None:
        """Lets a signal wait from here on until the run looks for it and has saved its step."""
        self.waits = True
        if self.signal is not None:  # its KeyboardInterrupt has been caught on the way
            raise self.before_training()

    def before_training(self) -> InterruptedRunError:
        """Returns the error of a run that has nothing to save."""
        next_start = "resumes the run" if self.resumes else "starts over"
        return self.error(f"came before training; the same command {next_start}")

    def error(self, what: str) -> InterruptedRunError:
        """Returns the error of this signal; `what` completes its sentence."""
        number = self.signal or signal.SIGTERM  # or it reached another process
        return InterruptedRunError(f"{signal.Signals(number).name} {what}.", number)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Catches SIGTERM, which machines get that are about to be taken away, and SIGINT, Ctrl-C.

    Signals reach Python's main thread alone: in any other, nothing is caught.

    Raises InterruptedRunError for a signal before `Interruption.wait`, and for one that comes
    after the run has last looked for it.
    """
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, interruption.ask)
        yield interruption
    except BaseException as error:
        if interruption.waits or interruption.signal is None:
            raise
        # Also an error that something on the way has made of the KeyboardInterrupt.
        cause = None if isinstance(error, KeyboardInterrupt) else error
        raise interruption.before_training() from cause
    finally:
        interruption.waits = True
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's
    if interruption.signal is not None:
        raise interruption.error("came when all was trained; the same command hands it back")
