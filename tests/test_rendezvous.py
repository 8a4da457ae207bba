"""Processes that cannot be one run: the same error in each, that names the reason, at once."""

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


def errors(*came, patience=60.0, address=None):
    """The error of each process, given `(processes, process)`; None for one that may join."""
    address = address or free_address()

    def error(numbers):
        try:
            rendezvous.meet(address, *numbers, patience=patience)
        except ParallelError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(len(came)) as pool:
        found = [*pool.map(error, came)]
    start = re.compile(rf"cannot join the \d processes at {address}: ")
    return [message and start.sub("", message) for message in found]


@pytest.fixture(autouse=True)
def no_late_processes(monkeypatch):
    monkeypatch.setattr(rendezvous, "_LATE", 1.0)


def test_rendezvous_of_all_processes():
    assert errors((3, 1), (3, 0), (3, 2)) == [None] * 3


@pytest.mark.parametrize(("processes", "twice"), [(2, 0), (3, 0), (3, 1)])
def test_process_number_that_comes_twice_is_an_error_of_all(processes, twice):
    """Under a patience of a minute, so that waiting for its end would be noticed."""
    came = [(processes, process) for process in (*range(processes - 1), twice)]
    found = errors(*came)
    assert len({*found}) == 1
    assert re.match(
        rf"2 came as process {twice}: \S+ \(pid \d+\), \S+ \(pid \d+\)\. Start each with a "
        rf"--process of its own, from 0 to {processes - 1}\.",
        found[0],
    )


@pytest.mark.parametrize("came", [[(2, 0), (3, 1)], [(2, 0), (3, 2)], [(3, 0), (2, 1)]])
def test_other_number_of_processes_is_an_error_of_all(came):
    for error in errors(*came):
        assert f"was started with --processes {came[1][0]}, and process 0 with" in error


def test_missing_processes_are_named():
    (first,) = errors((3, 0), patience=0.5)
    assert first.startswith("after 0 s not all have come. Missing: process 1, 2. Start each")
    address = free_address()
    (second,) = errors((3, 1), patience=0.5, address=address)
    assert re.match(r"after 0 s not .* Process 0 does not answer there \(.*refused\)\.", second)


def test_process_that_gives_up_may_come_again():
    """Whoever has closed its connection has not come twice."""
    host, port = (address := free_address()).split(":")
    listening = rendezvous._listen

    def listen_and_lose_one(number):
        listener = listening(number)
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b'jaxft {"process": 1, "processes": 2, "host": "h", "pid": 1}\n')
        return listener

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rendezvous, "_listen", listen_and_lose_one)
        assert errors((2, 0), (2, 1), address=address) == [None, None]


def test_port_of_another_program_is_an_error():
    """Such as jax's own service, of a run that has begun."""
    with socket.create_server(("", 0)) as server:

        def answer():
            for _ in range(2):
                connection, _ = server.accept()
                with connection:
                    connection.sendall(b"220 another protocol\r\n")
                    connection.recv(4096)

        thread = threading.Thread(target=answer)
        thread.start()
        found = errors((2, 0), (2, 1), address=f"127.0.0.1:{server.getsockname()[1]}")
        thread.join()
    for process, error in enumerate(found):
        assert error.startswith(
            "a run has begun there already, or another program listens. Is process "
            f"{process} started twice, or is the port in use?"
        )


def test_port_that_cannot_be_listened_on_is_an_error(monkeypatch):
    def denied(port):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(rendezvous, "_listen", denied)
    (error,) = errors((2, 0))
    assert error.startswith("process 0 cannot listen at its port: Permission denied. ")


def test_strangers_are_not_counted():
    address = free_address()
    listening = rendezvous._listen
    strangers = []

    def listen(number):
        listener = listening(number)
        for line in (b"", b"GET / HTTP/1.1\r\n\r\n", b"jaxft 1\n", b"jaxft {}\n"):
            strangers.append(socket.create_connection(("127.0.0.1", number)))
            strangers[-1].sendall(line)
        return listener

    monkeypatch = pytest.MonkeyPatch()
    with monkeypatch.context() as patch:
        patch.setattr(rendezvous, "_listen", listen)
        assert errors((2, 0), (2, 1), address=address) == [None, None]
    for stranger in strangers:
        stranger.close()
