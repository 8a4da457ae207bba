"""Processes that cannot form one run raise the same error, which names the reason, at once."""

import re
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxft import rendezvous
from jaxft.errors import ParallelError


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def errors(*arguments, timeout=60.0, address=None):
    """Returns each process's error, given its `(processes, process)`; None for a success."""
    address = address or free_address()

    def error_of(numbers):
        try:
            rendezvous.meet(address, *numbers, timeout=timeout)
        except ParallelError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(arguments)) as pool:
        messages = [*pool.map(error_of, arguments)]
    start = re.compile(rf"cannot join the \d processes at {address}: ")
    return [message and start.sub("", message) for message in messages]


@pytest.fixture(autouse=True)
def short_grace_period(monkeypatch):
    monkeypatch.setattr(rendezvous, "_GRACE_PERIOD", 1.0)


def test_rendezvous_succeeds_once_all_processes_are_there():
    assert errors((3, 1), (3, 0), (3, 2)) == [None] * 3


@pytest.mark.parametrize(("processes", "twice"), [(2, 0), (3, 0), (3, 1)])
def test_rendezvous_rejects_a_duplicate_process_number(processes, twice):
    """The timeout is a minute, so that waiting for it would be noticed."""
    arguments = [(processes, process) for process in (*range(processes - 1), twice)]
    messages = errors(*arguments)
    assert len({*messages}) == 1
    assert re.match(
        rf"2 were started as process {twice}: \S+ \(pid \d+\), \S+ \(pid \d+\)\. Start each with a "
        rf"different --process, from 0 to {processes - 1}\.",
        messages[0],
    )


@pytest.mark.parametrize("arguments", [[(2, 0), (3, 1)], [(2, 0), (3, 2)], [(3, 0), (2, 1)]])
def test_rendezvous_rejects_different_numbers_of_processes(arguments):
    for error in errors(*arguments):
        assert f"was started with --processes {arguments[1][0]}, and process 0 with" in error


def test_rendezvous_names_missing_processes():
    (first,) = errors((3, 0), timeout=0.5)
    assert first.startswith("after 0 s some processes are missing: process 1, 2. Start each")
    address = free_address()
    (second,) = errors((3, 1), timeout=0.5, address=address)
    assert re.match(r"after 0 s some .* Process 0 does not answer there \(.*refused\)\.", second)


def test_rendezvous_accepts_a_process_that_reconnects():
    """A process that closed its connection does not count."""
    host, port = (address := free_address()).split(":")
    listen = rendezvous._listen

    def listen_and_lose_one_connection(number):
        listener = listen(number)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b'jaxft {"process": 1, "processes": 2, "host": "h", "pid": 1}\n')
        return listener

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendezvous, "_listen", listen_and_lose_one_connection)
        assert errors((2, 0), (2, 1), address=address) == [None, None]


def test_rendezvous_at_the_port_of_another_program_is_an_error():
    """For example JAX's service of a run that has begun."""
    with socket.create_server(("", 0)) as server:

        def answer():
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"220 another protocol\r\n")
                    connection.recv(4096)

        thread = threading.Thread(target=answer)
        thread.start()
        messages = errors((2, 0), (2, 1), address=f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    for process, error in enumerate(messages):
        assert error.startswith(
            "a run has begun there already, or another program listens. Is process "
            f"{process} started twice, or is the port in use?"
        )


def test_rendezvous_without_permission_for_the_port_is_an_error(monkeypatch):
    def denied(port):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rendezvous, "_listen", denied)
    (error,) = errors((2, 0))
    assert error.startswith("process 0 cannot listen at its port: Permission denied. ")


def test_rendezvous_ignores_other_programs():
    address = free_address()
    listen = rendezvous._listen
    strangers = []

    def listen_among_strangers(number):
        listener = listen(number)
        for line in (b"", b"GET / HTTP/1.1\r\n\r\n", b"jaxft 1\n", b"jaxft {}\n"):
            strangers.append(socket.create_connection(("127.0.0.1", number)))
            strangers[-1].sendall(line)
        return listener

    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(rendezvous, "_listen", listen_among_strangers)
        assert errors((2, 0), (2, 1), address=address) == [None, None]
    for stranger in strangers:
        stranger.close()
