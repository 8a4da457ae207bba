"""What the processes of a run do together, and what the first one does for all."""

from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

_LONGEST = 4096  # bytes of an answer to the others


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def agree(flag: bool) -> bool:
    """Whether `flag` is True in any process; all must ask, at the same point of the program.

    It waits for the devices, unless there is but one process, which pays nothing.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


def barrier(name: str) -> None:
    """Waits until every process has come to the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def of_first(tree: T) -> T:
    """The first process's arrays, in NumPy's memory in every process; all must ask."""
    if jax.process_count() == 1:
        return tree
    return cast(T, jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree)))


def first_answers(ask: Callable[[], str]) -> str:
    """What `ask` returns in the first process; the others wait for it and do not ask.

    All processes must call it. What it returns decides, so that all take the same way: an error
    that only the first one raised would leave the others waiting for it.
    """
    answer = ask() if is_first() else ""
    if jax.process_count() == 1:
        return answer
    sent = np.frombuffer(answer.encode()[:_LONGEST].ljust(_LONGEST, b"\0"), np.uint8)
    received = np.asarray(multihost_utils.broadcast_one_to_all(sent)).astype(np.uint8)
    return answer or received.tobytes().rstrip(b"\0").decode(errors="ignore")
