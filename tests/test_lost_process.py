"""A process that dies or hangs ends the other process with one line and exit code 75."""

import os
import signal
import socket
import subprocess
import sys

import pytest

CHILD = """
import os, sys
from jaxft import distributed, lost_process

distributed._HEARTBEAT_TIMEOUT = 5
distributed.start(sys.argv[1], 2, int(sys.argv[2]))
print("joined", flush=True)
os.write(2, b"C++ may write to stderr\\n")
try:
    with lost_process.translated():
        while True:
            distributed.any_process(False)
except lost_process.LostProcessError as error:
    print(f"LostProcessError: {error}", file=sys.stderr)
    os._exit(lost_process.EXIT_CODE)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "number"),
    [(0, signal.SIGKILL), (1, signal.SIGSTOP)],
    ids=["first killed", "second hangs"],
)
def test_lost_process_ends_the_other_with_one_line(process, number):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    started = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", CHILD, address, str(index)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
        )
        for index in range(2)
    ]  # fmt: skip
    for child in started:
        while child.stdout.readline() not in ("joined\n", ""):
            pass
    lost, other = started[process], started[1 - process]
    lost.send_signal(number)
    try:
        _, errors = other.communicate(timeout=60)
    finally:
        lost.kill()
        lost.communicate()
    assert other.returncode == 75, errors
    assert errors.splitlines()[0] == "C++ may write to stderr"
    (line,) = errors.splitlines()[1:]
    assert line.startswith("LostProcessError: ")
    assert "of this run has ended or does not answer" in line
    assert line.endswith("The same command resumes from the last checkpoint.")
