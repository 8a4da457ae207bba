"""Prefetching: in order, ended by whoever asks, and never waiting for a thread that is gone."""

import concurrent.futures.thread
import sys
import threading

import pytest

from jaxft.data import prefetch as module
from jaxft.data.prefetch import prefetch
from jaxft.errors import DataError


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("arguments", [range(0), range(3, 4), range(2, 30)])
def test_results_come_in_order(workers, arguments):
    assert list(prefetch(lambda k: k * k, arguments, workers)) == [k * k for k in arguments]


def test_no_more_than_two_a_thread_are_made_ahead():
    made, third = [], threading.Event()

    def make(k):
        made.append(k)
        if len(made) == 5:
            third.set()
        return k

    stream = prefetch(make, range(100), 2)
    assert next(stream) == 0
    assert third.wait(60)  # the one that was asked for, and two a thread
    stream.close()
    assert max(made) <= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_reach_the_consumer_in_their_turn(workers):
    def make(k):
        return 10 // (3 - k)

    stream = prefetch(make, range(10), workers)
    assert [next(stream) for _ in range(3)] == [3, 5, 10]
    with pytest.raises(ZeroDivisionError):
        next(stream)


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), GeneratorExit()])
def test_what_would_end_the_program_is_an_error(error):
    """Else a run would end as if all were well."""

    def make(k):
        raise error

    with pytest.raises(DataError, match=f"has died \\({type(error).__name__}.*With workers=0"):
        next(prefetch(make, range(10), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stopped_iteration_does_not_end_the_epoch(workers):
    def make(k):
        return next(iter(()))

    with pytest.raises(RuntimeError, match="raised StopIteration"):
        next(prefetch(make, range(10), workers))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_dead_thread_is_an_error(workers, monkeypatch, caplog):
    """It dies outside the function, with a call in hand whose result nobody will ever set."""
    monkeypatch.setattr(module, "_GLANCE", 0.01)
    monkeypatch.setattr(concurrent.futures.thread._WorkItem, "run", lambda self: sys.exit())
    with pytest.raises(DataError, match=r"has died \(jaxft-data_\d\): start the run again"):
        next(prefetch(lambda k: k, range(10), workers))
