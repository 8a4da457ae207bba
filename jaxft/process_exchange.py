"""Exchanges values between the processes of a run before it trains.

Each process writes values to the key-value store of `jax.distributed` and reads the values of all
others. A collective computation would not do: a process that fails before it joins would keep all
others waiting.

Every process must exchange the same keys, since each exchange waits for all of them. The decision
to exchange a key therefore depends only on values that all processes have received, and a process
that cannot compute its value sends a message or None instead. Keys form rounds, which begin with
the key `facts`, since a failed process sends its error there. A round ends at a barrier, because a
process that exits also ends the others: none may exit before the others have read its values.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import jax
from jax._src import distributed

from jaxft.errors import ParallelError

# In seconds.
_FAILURE_TIMEOUT = 60.0  # longest wait of a failed process for the others to arrive
_BARRIER_TIMEOUT = 10.0  # at the end of a round
_NOTICE_SECONDS = 60.0  # until a line on stderr names the missing processes
_POLL_SECONDS = 2.0  # of one wait in C++, after which Python can handle a signal

_round = 0  # rounds that have ended in this process
_last_rounds = 0  # among them, rounds that no other was to follow


@contextmanager
def announced() -> Iterator[None]:
    """Sends an error in the block to the other processes, which raise it as ParallelError.

    Wrap the work that precedes `check_agreement`; `check_agreement` itself may be inside too.
    Without the message the other processes would wait for the facts of this one. An exit with a
    code other than 0, as after an unknown option, is sent as well. An error within or after the
    last round is not sent, since the others do not wait for this process any more.
    """
    last_rounds_before = _last_rounds
    try:
        yield
    except (Exception, SystemExit) as error:
        message = failure_message(error)
        if message and last_rounds_before == _last_rounds and num_processes() > 1:
            with suppress(jax.errors.JaxRuntimeError):
                exchange("facts", {"error": message}, timeout=_FAILURE_TIMEOUT)
            end_round()
        raise


def failure_message(error: Exception | SystemExit) -> str:
    """Returns the message of an error; empty for an exit with code 0, as after `--help`."""
    if not isinstance(error, SystemExit):
        return f"{type(error).__name__}: {error}"
    return f"it exited with code {error.code}; its output shows why." if error.code else ""


def raise_error(received: Sequence[Mapping[str, Any]]) -> None:
    """Raises ParallelError if a process has sent an error in place of its values."""
    for process, values in enumerate(received):
        if "error" in values:
            raise ParallelError(f"process {process} of this run has failed: {values['error']}")


def exchange(
    name: str, value: Mapping[str, Any], *, timeout: float = float("inf")
) -> list[dict[str, Any]]:
    """Sends a value under a key and returns the values of all processes, in their order.

    Waits until each process has sent its value. After `_NOTICE_SECONDS` it prints which processes
    are missing: a process may be alive and still never send its value.

    Args:
      name: name of the key in this round.
      value: JSON values of this process.
      timeout: longest wait in seconds.

    Raises:
      jax.errors.JaxRuntimeError: a value is missing after `timeout`, or a process has ended.
    """
    client, key = distributed.global_state.client, f"jaxft/{_round}/{name}"
    assert client is not None  # `jax.distributed` is initialised if there are several processes
    client.key_value_set(f"{key}/{distributed.global_state.process_id}", json.dumps(value))
    started, has_printed = time.monotonic(), False
    values: list[dict[str, Any]] = []
    while len(values) < num_processes():
        try:
            next_key = f"{key}/{len(values)}"
            received = client.blocking_key_value_get(next_key, int(1000 * _POLL_SECONDS))
            values.append(json.loads(received))
        except jax.errors.JaxRuntimeError as error:
            waited = time.monotonic() - started
            if "DEADLINE_EXCEEDED" not in str(error) or waited > timeout:
                raise
            if waited > _NOTICE_SECONDS and not has_printed:
                has_printed = True
                sent = {int(path.rpartition("/")[2]) for path, _ in client.key_value_dir_get(key)}
                missing = ", ".join(str(i) for i in range(num_processes()) if i not in sent)
                print(
                    f"Waiting for process {missing} of {num_processes()} to check its images, and "
                    "to compare recipe, images and workdir before training. If a process hangs, "
                    "end it: the others then end with an error.",
                    file=sys.stderr,
                )
    return values


def end_round(*, last: bool = False) -> None:
    """Waits until all processes have read each other's values, then numbers the next round.

    Args:
      last: whether no round follows: the processes have compared everything, or one has failed.
    """
    global _round, _last_rounds
    client = distributed.global_state.client
    assert client is not None  # see `_exchange`
    with suppress(jax.errors.JaxRuntimeError):  # a process is missing: the error is raised already
        client.wait_at_barrier(f"jaxft/{_round}/read", int(1000 * _BARRIER_TIMEOUT))
    _round += 1
    _last_rounds += last


def num_processes() -> int:
    """Returns the number of processes of this run."""
    return int(distributed.global_state.num_processes or 1)
