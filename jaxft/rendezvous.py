"""Processes of a run find each other, before jax starts its service at the same address.

jax ends a process that comes with a wrong number by `abort()` in C++, or lets all wait until their
time is over. Here process 0 listens until each number has come once. It then answers all of them,
or at once if two processes contradict each other.
"""

import json
import os
import platform
import selectors
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from threading import Thread

from jaxft.errors import ParallelError

_LATE = 5.0  # seconds in which processes that come after an error hear of it too
_PREFIX = b"jaxft "


@dataclass(frozen=True)
class _Process:
    process: int
    processes: int
    host: str
    pid: int


def meet(coordinator: str, processes: int, process: int, *, patience: float) -> None:
    """Returns once all processes of the run have come, each with a number of its own.

    Args:
      coordinator: HOST:PORT at which process 0 listens meanwhile.
      processes: how many there are.
      process: the number of this one, from 0.
      patience: seconds.

    Raises:
      ParallelError: in all that have come, if a number came twice or a process expects another
        number of processes; if one has not come in time; or if the port is taken.
    """
    host, port = coordinator.rsplit(":", 1)
    address, late = (host.strip("[]"), int(port)), time.monotonic() + patience
    thread, taken = None, ""
    if process == 0:
        try:
            listener = _listen(address[1])
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            taken = f"process 0 cannot listen at its port: {reason}."
        else:
            arguments = (listener, processes, patience)
            thread = Thread(target=_call_roll, args=arguments, name="jaxft-roll", daemon=True)
            thread.start()
    own = _Process(process, processes, platform.node(), os.getpid())
    problem = _ask(address, own, late, patience, taken)
    if not problem:
        return
    if thread:
        thread.join()
    raise ParallelError(
        f"cannot join the {processes} processes at {coordinator}: {problem} Start each with a "
        f"--process of its own, from 0 to {processes - 1}."
    )


def _ask(address: tuple[str, int], own: _Process, late: float, patience: float, taken: str) -> str:
    """Returns why the processes cannot meet; nothing once all have come.

    `taken` is why this process 0 cannot listen itself; another one may answer.
    """
    line = _PREFIX + json.dumps(asdict(own)).encode() + b"\n"
    start = f"after {patience:.0f} s not all have come."
    while True:
        left = late - time.monotonic()
        try:
            with socket.create_connection(address, timeout=max(0.1, min(5, left))) as connection:
                connection.settimeout(max(0.1, left + 1))  # process 0 answers at its own time
                connection.sendall(line)
                try:
                    answer = _read(connection)
                except TimeoutError:
                    return f"{start} Process 0 is there; of the others some are not."
            if answer.startswith(_PREFIX) and answer.endswith(b"\n"):
                return str(json.loads(answer.removeprefix(_PREFIX)))
            if answer:
                return (
                    "a run has begun there already, or another program listens. Is process "
                    f"{own.process} started twice, or is the port in use?"
                )
            problem = "it ended"
        except OSError as error:
            problem = str(error)
        if taken:
            return taken
        if left < 0:
            return f"{start} Process 0 does not answer there ({problem})."
        time.sleep(0.2)


def _read(connection: socket.socket) -> bytes:
    """Returns a line of ours, or the beginning of what anyone else sends."""
    found = b""
    while not found.endswith(b"\n") and (not found or found.startswith(_PREFIX)):
        if not (more := connection.recv(4096)):
            break
        found += more
    return found


def _listen(port: int) -> socket.socket:
    # All addresses of both kinds, as jax. Not its SO_REUSEPORT: a second process 0 must be noticed.
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _call_roll(listener: socket.socket, processes: int, patience: float) -> None:
    """Answers all that come, once all have, or they contradict each other, or time is over."""
    came: dict[socket.socket, _Process] = {}
    seen, problem, late = {0}, "", time.monotonic() + patience
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(came) < processes and (left := late - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is listener:
                    connection, _ = listener.accept()
                    connection.settimeout(1)
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                try:
                    line = _read(connection).removeprefix(_PREFIX)
                    came[connection] = _Process(**json.loads(line))
                except (OSError, ValueError, TypeError):  # it has ended, or is none of ours
                    selector.unregister(connection)
                    came.pop(connection, None)
                    connection.close()
                    continue
                seen.add(came[connection].process)
                if not problem and (problem := _contradiction([*came.values()], processes)):
                    late = time.monotonic() + _LATE
            if problem:
                for connection in came:  # whose number the next connection may have
                    selector.unregister(connection)
                _answer(came, problem)
                came.clear()
        # First of all, the port is free for jax, who answers those that ask from now on.
        for key in [*selector.get_map().values()]:
            if key.fileobj not in came:
                key.fileobj.close()  # type: ignore[union-attr]
    if came and len(came) < processes:
        absent = {*range(processes)} - {each.process for each in came.values()}
        missing = ", ".join(map(str, sorted(absent - seen or absent)))
        problem = f"after {patience:.0f} s not all have come. Missing: process {missing}."
    _answer(came, problem)


def _answer(came: Iterable[socket.socket], problem: str) -> None:
    for connection in came:
        with suppress(OSError):
            connection.sendall(_PREFIX + json.dumps(problem).encode() + b"\n")
        connection.close()


def _contradiction(came: Sequence[_Process], processes: int) -> str:
    for each in came:
        if each.processes != processes:
            return (
                f"process {each.process} on {each.host} was started with --processes "
                f"{each.processes}, and process 0 with --processes {processes}."
            )
    number, count = Counter(each.process for each in came).most_common(1)[0]
    if count == 1:
        return ""
    places = [f"{each.host} (pid {each.pid})" for each in came if each.process == number]
    return f"{count} came as process {number}: {', '.join(places)}."
