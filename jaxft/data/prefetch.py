"""Computes results in threads ahead of their use.

Pillow decodes and resizes mostly without the GIL. Up to about eight threads therefore scale as
processes do, start at once, and share a cache of decoded images. `jaxft.data.worker_processes` is
for more cores; `scripts/benchmark_data.py` measures both.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TypeVar

from jaxft.errors import DataError

T = TypeVar("T")

_POLL_SECONDS = 1.0  # interval between checks that the threads are alive


def prefetch(
    function: Callable[[int], T], arguments: range, workers: int
) -> Generator[T, None, None]:
    """Yields `function(argument)` for each argument in order, computed ahead by threads.

    At most two results per thread are computed ahead. Closing the generator cancels calls that have
    not started; calls in progress run to their end.

    Args:
      function: a thread-safe function.
      arguments: its arguments.
      workers: number of threads; 0 calls `function` when a result is requested.

    Raises:
      DataError: a thread has died without a result.
      Exception: an exception of `function`, when its result is requested.
    """
    if workers == 0:
        for argument in arguments:
            yield function(argument)
        return
    threads: list[threading.Thread] = []
    pool = ThreadPoolExecutor(
        workers, "jaxft-data", initializer=lambda: threads.append(threading.current_thread())
    )
    try:
        remaining = iter(arguments)
        # Two per thread: one in progress, one ready. More would only take memory.
        pending = deque(pool.submit(function, k) for k in islice(remaining, 2 * workers))
        while pending:
            future = pending.popleft()
            pending.extend(pool.submit(function, k) for k in islice(remaining, 1))
            yield _result(future, threads)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(future: Future[T], threads: list[threading.Thread]) -> T:
    dead_threads: list[str] = []
    # A dead thread never completes its future, so waiting without a timeout could hang.
    while not dead_threads and not wait([future], timeout=_POLL_SECONDS).done:
        dead_threads = [thread.name for thread in threads if not thread.is_alive()]
    error = future.exception() if future.done() else None
    # Re-raising SystemExit would end the program as if it had succeeded.
    if dead_threads or not isinstance(error, Exception | None):
        cause = repr(error) if error else dead_threads[0]
        raise DataError(
            f"a thread that prepares batches has died ({cause}): start the run again to resume "
            "from its last checkpoint. Set workers=0 to see the cause."
        ) from error
    return future.result()
