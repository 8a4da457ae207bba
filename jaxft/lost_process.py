"""Ends a process with one line and exit code 75 when another process of the run is lost.

JAX ends the processes that remain by `abort()` in C++, after a page of log and stack trace, and
offers no hook: a Python `missed_heartbeat_callback` fails with `std::bad_cast` (jaxlib 0.10.2).
Therefore a C signal handler for SIGABRT replaces that end. C++'s messages on stderr pass through a
pipe, which holds back those about the lost process.
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

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
_LOSS_ON_STDERR = re.compile(rb"coordination_service|JAX distributed service")
_LOSS_IN_ERROR = re.compile(
    r"Gloo .*fail|Connection (closed|reset) by peer|oordination ?[Ss]ervice|heartbeat|Socket closed"
)

_handlers: list[Any] = []


class LostProcessError(ParallelError):
    """Another process of the run has ended or does not answer."""

    def __init__(self, process: str = "another process") -> None:
        super().__init__(
            f"{process} of this run has ended or does not answer; its output may show why. The "
            "same command resumes from the last checkpoint."
        )


@contextmanager
def translated() -> Iterator[None]:
    """Translates errors of communication with another process to LostProcessError."""
    try:
        yield
    except Exception as error:
        if jax.distributed.is_initialized() and _is_loss(error):
            raise LostProcessError from error
        raise


def _is_loss(error: BaseException | None) -> bool:
    while error is not None:
        if _LOSS_IN_ERROR.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def install_abort_handler() -> None:
    """Makes this process exit with one line and `EXIT_CODE` where JAX would abort it."""
    terminal = os.dup(2)
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    encoding = getattr(sys.stderr, "encoding", None)
    sys.stderr = os.fdopen(
        terminal, "w", buffering=1, encoding=encoding, errors="backslashreplace", closefd=False
    )
    held_back: list[bytes] = []

    def forward() -> None:
        while chunk := os.read(reader, 2**16):
            if held_back or _LOSS_ON_STDERR.search(chunk):
                held_back.append(chunk)
            else:
                _write(terminal, chunk)

    threading.Thread(target=forward, name="jaxft-stderr", daemon=True).start()

    def handle_abort(_: int) -> None:
        time.sleep(0.2)  # until the last messages have passed through the pipe
        messages = b"".join(held_back)
        if not _LOSS_ON_STDERR.search(messages):
            return  # another reason: abort() ends the process
        number = re.search(rb"unhealthy[^\n]*\n(\d+)\n", messages)
        error = LostProcessError(f"process {int(number[1])}" if number else "another process")
        _write(terminal, f"{type(error).__name__}: {error}\n".encode())
        os._exit(EXIT_CODE)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(handle_abort)
    _handlers.append(handler)  # keeps it alive
    libc = ctypes.CDLL(None)
    libc.signal.argtypes, libc.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))


def _write(terminal: int, text: bytes) -> None:
    with suppress(OSError):
        os.write(terminal, text)
