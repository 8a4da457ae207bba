"""Signals and the exit of a process that runs one command.

Imports the standard library only: the `jaxft` program calls `exit_on_signal` before it imports jax,
which takes seconds.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

# 75 is EX_TEMPFAIL of sysexits.h, "try again later"; shells use 130 for Ctrl-C.
EXIT_CODES = {signal.SIGTERM: 75, signal.SIGINT: 130}


def exit_on_signal(message: str) -> None:
    """Makes SIGTERM and SIGINT print their name with `message` and exit at once."""

    def stop(number: int, _: FrameType | None) -> None:
        os.write(2, f"\n{signal.Signals(number).name} {message}\n".encode())
        os._exit(EXIT_CODES[signal.Signals(number)])

    for number in EXIT_CODES:
        signal.signal(number, stop)


@contextmanager
def handled_by(
    handler: Callable[[int, FrameType | None], None] | signal.Handlers,
) -> Iterator[None]:
    """Handles SIGTERM and SIGINT by `handler` within the block; only in the main thread."""
    previous: dict[int, Any] = {number: signal.signal(number, handler) for number in EXIT_CODES}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before or signal.SIG_DFL)  # None: installed by C code


def exit_process(code: int) -> None:
    """Exits with `code`, at once unless it is 0 and standard output can be written.

    A normal exit would wait for threads, such as those that compile the next stage.
    """
    for number in EXIT_CODES:
        signal.signal(number, signal.SIG_IGN)  # the exit code is decided
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:  # Python would flush again, fail, and exit with code 120
        os._exit(code)
    if code:
        os._exit(code)


def show(text: str) -> None:
    """Prints `text`, quietly if nobody reads it to the end, as with `| head`."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # Python would flush again at its end, and print the error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def fail(message: str, code: int) -> int:
    """Prints `message` on standard error and returns `code`."""
    with suppress(OSError):  # the disk behind it may be full
        if sys.stderr is not None:
            print(message, file=sys.stderr, flush=True)
    return code
