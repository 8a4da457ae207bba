"""A process of the run that died or stopped ends the others with one sentence and exit code 75.

jax ends a process whose neighbour is lost by `abort()` in C++, after a page of log and stack trace,
and offers no hook: a Python `missed_heartbeat_callback` fails with `std::bad_cast` (jaxlib 0.10.2).
Therefore a C signal handler for SIGABRT replaces the end, and what C++ writes to stderr passes
through a pipe, where its last words about the neighbour are held back.
"""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import jax

from jaxft.errors import ParallelError

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
_OF_LOSS = re.compile(rb"coordination_service|JAX distributed service")
_IN_ERRORS = re.compile(
    r"Gloo .*fail|Connection (closed|reset) by peer|oordination ?[Ss]ervice|heartbeat|Socket closed"
)

_handlers: list[Any] = []


class LostProcessError(ParallelError):
    """Another process of the run has ended or does not answer."""

    def __init__(self, who: str = "another process") -> None:
        super().__init__(
            f"{who} of this run has ended or does not answer; its own output may tell why. The "
            "same command goes on from the last checkpoint."
        )


@contextmanager
def translated() -> Iterator[None]:
    """Raises LostProcessError for errors of communication with another process."""
    try:
        yield
    except Exception as error:
        if jax.distributed.is_initialized() and _tells_of_loss(error):
            raise LostProcessError from error
        raise


def _tells_of_loss(error: BaseException | None) -> bool:
    while error is not None:
        if _IN_ERRORS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def end_clearly() -> None:
    """Has this process end with one sentence, and `EXIT_CODE`, where jax would abort it."""
    terminal = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    encoding = getattr(sys.stderr, "encoding", None)
    sys.stderr = os.fdopen(
        terminal, "w", buffering=1, encoding=encoding, errors="backslashreplace", closefd=False
    )
    held: list[bytes] = []

    def forward() -> None:
        while chunk := os.read(reader, 2**16):
            if held or _OF_LOSS.search(chunk):
                held.append(chunk)
            else:
                _write(terminal, chunk)

    threading.Thread(target=forward, name="jaxft-stderr", daemon=True).start()

    def aborted(_: int) -> None:
        time.sleep(0.2)  # until the last words have come through the pipe
        words = b"".join(held)
        if not _OF_LOSS.search(words):
            return  # another reason: abort() ends the process
        named = re.search(rb"unhealthy[^\n]*\n(\d+)\n", words)
        error = LostProcessError(f"process {int(named[1])}" if named else "another process")
        _write(terminal, f"{type(error).__name__}: {error}\n".encode())
        os._exit(EXIT_CODE)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)
    _handlers.append(handler)  # must outlive this call
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


def _write(terminal: int, text: bytes) -> None:
    with suppress(OSError):
        os.write(terminal, text)
