"""Checks that all processes of a run are there, before JAX starts its service at the same address.

JAX ends a process with a wrong number by `abort()` in C++, or lets all processes wait for their
timeout. Here process 0 listens until each number has connected once, then answers all of them. If
two processes contradict each other, it answers at once.
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

_GRACE_PERIOD = 5.0  # seconds after an error in which late processes still receive it
_PREFIX = b"jaxft "


@dataclass(frozen=True)
class _Process:
    process: int
    processes: int
    host: str
    pid: int


def meet(coordinator: str, processes: int, process: int, *, timeout: float) -> None:
    """Waits until all processes of the run have connected, each with a different number.

    Args:
      coordinator: HOST:PORT, at which process 0 listens meanwhile.
      processes: number of processes.
      process: index of this process, from 0.
      timeout: seconds.

    Raises:
      ParallelError: in all connected processes, if two have the same number or expect different
        numbers of processes; if a process is missing after `timeout`; if the port is in use.
    """
    host, port = coordinator.rsplit(":", 1)
    address, deadline = (host.strip("[]"), int(port)), time.monotonic() + timeout
    thread, listen_error = None, ""
    if process == 0:
        try:
            listener = _listen(address[1])
        except OSError as error:
            reason = os.strerror(error.errno) if error.errno else str(error)
            listen_error = f"process 0 cannot listen at its port: {reason}."
        else:
            arguments = (listener, processes, timeout)
            thread = Thread(target=_serve, args=arguments, name="jaxft-rendezvous", daemon=True)
            thread.start()
    this = _Process(process, processes, platform.node(), os.getpid())
    problem = _connect(address, this, deadline, timeout, listen_error)
    if not problem:
        return
    if thread:
        thread.join()
    raise ParallelError(
        f"cannot join the {processes} processes at {coordinator}: {problem} Start each with a "
        f"different --process, from 0 to {processes - 1}."
    )


def _connect(
    address: tuple[str, int], this: _Process, deadline: float, timeout: float, listen_error: str
) -> str:
    """Connects to process 0 and returns why the processes cannot meet; empty once all are there.

    `listen_error` is the reason why this process 0 cannot listen; another one may answer.
    """
    line = _PREFIX + json.dumps(asdict(this)).encode() + b"\n"
    missing = f"after {timeout:.0f} s some processes are missing."
    while True:
        remaining = deadline - time.monotonic()
        try:
            connect_timeout = max(0.1, min(5, remaining))
            with socket.create_connection(address, timeout=connect_timeout) as connection:
                connection.settimeout(
                    max(0.1, remaining + 1)
                )  # process 0 answers at its own timeout
                connection.sendall(line)
                try:
                    answer = _read_line(connection)
                except TimeoutError:
                    return f"{missing} Process 0 is there; some others are not."
            if answer.startswith(_PREFIX) and answer.endswith(b"\n"):
                return str(json.loads(answer.removeprefix(_PREFIX)))
            if answer:
                return (
                    "a run has begun there already, or another program listens. Is process "
                    f"{this.process} started twice, or is the port in use?"
                )
            problem = "it ended"
        except OSError as error:
            problem = str(error)
        if listen_error:
            return listen_error
        if remaining < 0:
            return f"{missing} Process 0 does not answer there ({problem})."
        time.sleep(0.2)


def _read_line(connection: socket.socket) -> bytes:
    """Returns a line of this protocol, or the first bytes of any other."""
    received = b""
    while not received.endswith(b"\n") and (not received or received.startswith(_PREFIX)):
        if not (chunk := connection.recv(4096)):
            break
        received += chunk
    return received


def _listen(port: int) -> socket.socket:
    # All IPv4 and IPv6 addresses, as JAX. No SO_REUSEPORT, so that a second process 0 is noticed.
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _serve(listener: socket.socket, processes: int, timeout: float) -> None:
    """Answers all processes: once all are connected, at a contradiction, or after the timeout."""
    connected: dict[socket.socket, _Process] = {}
    seen, problem, deadline = {0}, "", time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(connected) < processes and (remaining := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(remaining):
                connection = key.fileobj
                assert isinstance(connection, socket.socket)
                if connection is listener:
                    connection, _ = listener.accept()
                    connection.settimeout(1)
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                try:
                    line = _read_line(connection).removeprefix(_PREFIX)
                    connected[connection] = _Process(**json.loads(line))
                except (OSError, ValueError, TypeError):  # it has ended, or is another program
                    selector.unregister(connection)
                    connected.pop(connection, None)
                    connection.close()
                    continue
                seen.add(connected[connection].process)
                if not problem and (problem := _contradiction([*connected.values()], processes)):
                    deadline = time.monotonic() + _GRACE_PERIOD
            if problem:
                for connection in connected:  # the next connection may reuse its file descriptor
                    selector.unregister(connection)
                _answer(connected, problem)
                connected.clear()
        # Close the listener first: JAX listens at the same port once the processes have an answer.
        for key in [*selector.get_map().values()]:
            if key.fileobj not in connected:
                key.fileobj.close()  # type: ignore[union-attr]
    if connected and len(connected) < processes:
        absent = {*range(processes)} - {other.process for other in connected.values()}
        missing = ", ".join(map(str, sorted(absent - seen or absent)))
        problem = f"after {timeout:.0f} s some processes are missing: process {missing}."
    _answer(connected, problem)


def _answer(connections: Iterable[socket.socket], problem: str) -> None:
    for connection in connections:
        with suppress(OSError):
            connection.sendall(_PREFIX + json.dumps(problem).encode() + b"\n")
        connection.close()


def _contradiction(connected: Sequence[_Process], processes: int) -> str:
    for other in connected:
        if other.processes != processes:
            return (
                f"process {other.process} on {other.host} was started with --processes "
                f"{other.processes}, and process 0 with --processes {processes}."
            )
    number, count = Counter(other.process for other in connected).most_common(1)[0]
    if count == 1:
        return ""
    places = [f"{other.host} (pid {other.pid})" for other in connected if other.process == number]
    return f"{count} were started as process {number}: {', '.join(places)}."
