"""What one process does for all: the processes of a run share its folder."""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

_LONGEST = 4096  # bytes of an answer to the others


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


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
