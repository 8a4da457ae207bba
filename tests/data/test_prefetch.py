"""`prefetch` keeps the order, passes on errors, and does not hang if a thread dies."""

import concurrent.futures.thread
import sys
import threading

import pytest

from jaxft.data import prefetch as module
from jaxft.data.prefetch import prefetch
from jaxft.errors import DataError


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("arguments", [range(0), range(3, 4), range(2, 30)])
def test_prefetch_keeps_the_order(workers, arguments):
    assert list(prefetch(lambda k: k * k, arguments, workers)) == [k * k for k in arguments]


def test_prefetch_computes_at_most_two_per_thread_ahead():
    calls, fifth_call = [], threading.Event()

    def function(k):
        calls.append(k)
        if len(calls) == 5:
            fifth_call.set()
        return k

    results = prefetch(function, range(100), 2)
    assert next(results) == 0
    assert fifth_call.wait(60)  # the requested one, and two per thread
    results.close()
    assert max(calls) <= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_raises_errors_in_order(workers):
    def function(k):
        return 10 // (3 - k)

    results = prefetch(function, range(10), workers)
    assert [next(results) for _ in range(3)] == [3, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(results)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_prefetch_converts_exit_exceptions_to_data_error(error):
    """SystemExit would otherwise end the run as if it had succeeded."""

    def function(k):
        raise error

    with pytest.raises(DataError, match=f"has died \\({type(error).__name__}.*Set workers=0"):
        next(prefetch(function, range(10), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_prefetch_does_not_take_stop_iteration_for_its_end(workers):
    def function(k):
        return next(iter(()))

    with pytest.raises(RuntimeError, match="raised StopIteration"):
        next(prefetch(function, range(10), workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_prefetch_detects_a_dead_thread(workers, monkeypatch, caplog):
    """The thread dies outside the function, so that its future never completes."""
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(concurrent.futures.thread._WorkItem, "run", lambda self: sys.exit())
    with pytest.raises(DataError, match=r"has died \(jaxft-data_\d\): start the run again"):
        next(prefetch(lambda k: k, range(10), workers))
