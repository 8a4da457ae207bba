"""Downloads under all failures: the right file in the end, or one error and no file."""

import hashlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from server import Answer, Server, serve

from jaxft import progress
from jaxft.errors import WeightsError
from jaxft.weights import download as download_module
from jaxft.weights import http
from jaxft.weights.download import cached_path, download

CONTENT = bytes(range(256)) * 4096  # four chunks
OTHER = CONTENT[::-1]
HALF = len(CONTENT) // 2
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ETAG = {"ETag": '"one"'}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(download_module, "RETRY_DELAY", 0)
    return tmp_path / "cache"


@pytest.fixture
def server():
    with serve({}) as server:
        yield server


def put(server: Server, answer: Answer) -> str:
    copies = {"breaks": [*answer.breaks], "statuses": [*answer.statuses]}  # the server pops them
    server.answers["/w.pth"] = replace(answer, **copies)
    return f"{server.url}/w.pth"


def cached_names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


# Response, whether the caller has a hash, and the Range headers that the requests must have.
FROM_HALF = f"bytes={HALF}-"
GOOD = {
    "at once": (Answer(CONTENT), True, [None]),
    "without a hash": (Answer(CONTENT), False, [None]),
    "redirected": (Answer(status=302, headers={"Location": "/elsewhere"}), True, [None, None]),
    "broken once": (Answer(CONTENT, breaks=[HALF]), True, [None, FROM_HALF]),
    "broken, by its etag": (Answer(CONTENT, headers=ETAG, breaks=[HALF]), False, [None, FROM_HALF]),
    "broken, no etag": (Answer(CONTENT, breaks=[HALF]), False, [None, None]),
    "weak etag": (Answer(CONTENT, headers={"ETag": 'W/"a"'}, breaks=[9]), False, [None, None]),
    "broken, no ranges": (Answer(CONTENT, breaks=[HALF], ranges=False), True, [None, FROM_HALF]),
    "broken often": (
        Answer(CONTENT, breaks=[9] * 9),
        True,
        [None, *(f"bytes={9 * i}-" for i in range(1, 10))],
    ),
    "busy": (Answer(CONTENT, statuses=[503, 429, 500]), True, [None] * 4),
}


@pytest.mark.parametrize(("answer", "has_hash", "ranges"), GOOD.values(), ids=GOOD)
def test_download_delivers_the_file(answer, has_hash, ranges, server, cache, capsys):
    server.answers["/elsewhere"] = Answer(CONTENT)
    url = put(server, answer)
    path = download(url, sha256=SHA256[:8] if has_hash else None)
    assert path.read_bytes() == CONTENT
    assert server.ranges() == ranges
    assert cached_names(cache) == [path.name]
    assert path.name.endswith("-w.pth")
    assert capsys.readouterr() == ("", "")  # no progress bar without a terminal


def test_download_uses_the_cached_file_without_a_server(cache):
    with serve({}) as server:
        url = put(server, Answer(CONTENT))
        path = download(url, sha256=SHA256)
    assert download(url, sha256=SHA256) == path
    assert download(url) == path


def test_download_uses_a_copy_at_cached_path(cache):
    url = "https://host.invalid/w.pth"
    cached_path(url).parent.mkdir()
    cached_path(url).write_bytes(CONTENT)
    assert download(url, sha256=SHA256) == cached_path(url)


def test_download_replaces_a_damaged_cached_file(server):
    url = put(server, Answer(CONTENT))
    path = download(url, sha256=SHA256)
    path.write_bytes(OTHER)
    assert download(url, sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("part", "ranges"),
    [
        (CONTENT[:HALF], [FROM_HALF]),
        (CONTENT, []),
        (OTHER[:HALF], [FROM_HALF, None]),
        (CONTENT + b"x", [f"bytes={len(CONTENT) + 1}-", None]),  # HTTP 416
    ],
    ids=["begun", "whole", "of another file", "too long"],
)
def test_download_resumes_the_part_of_a_killed_process(part, ranges, server, cache):
    url = put(server, Answer(CONTENT))
    cache.mkdir()
    cached_path(url).with_name(f"{cached_path(url).name}.part").write_bytes(part)
    assert download(url, sha256=SHA256).read_bytes() == CONTENT
    assert server.ranges() == ranges
    assert len(cached_names(cache)) == 1


def test_cached_path_differs_by_url():
    urls = ["https://a.org/w.pth", "https://b.org/w.pth", "https://a.org/w.pth?v=2"]
    assert len({cached_path(url) for url in urls}) == 3
    assert len(cached_path("https://a.org/" + 300 * "w").name) < 128


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"JAXFT_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"JAXFT_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/jaxft"),
        ({"JAXFT_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/jaxft"),
    ],
)
def test_cache_folder_follows_the_environment(variables, folder, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(download_module.cache_folder()) == folder


# Response, the expected number of requests, and texts in the error.
BAD = {
    "wrong hash": (Answer(OTHER), 1, ["sha256 is", f"begin with {SHA256}", "Run again"]),
    "broken always": (Answer(CONTENT, breaks=[0] * 9), 4, ["ended after 0 of", "4 times"]),
    "always as far": (Answer(CONTENT, breaks=[9] * 9, ranges=False), 4, ["ended after 9 of"]),
    "too short": (Answer(CONTENT, length=9), 1, ["sha256 is"]),
    "too long": (Answer(CONTENT, length=HALF * 3, ranges=False), 4, ["1,048,576 of 1,572,864"]),
    "missing": (Answer(status=404), 1, ["no such file (HTTP 404", "check the URL"]),
    "forbidden": (Answer(status=403), 1, ["refuses access (HTTP 403", "login"]),
    "a teapot": (Answer(status=418), 1, ["HTTP 418"]),
    "down": (Answer(status=503), 4, ["unavailable (HTTP 503", "4 times", "later"]),
    "unencrypted": (
        Answer(status=302, headers={"Location": "http://a.org/w"}),
        1,
        ["redirects to http://a.org/w", "not encrypted"],
    ),
}


@pytest.mark.parametrize(("answer", "num_requests", "texts"), BAD.values(), ids=BAD)
def test_download_failure_leaves_no_file(answer, num_requests, texts, server, cache):
    url = put(server, answer)
    with pytest.raises(WeightsError) as raised:
        download(url, sha256=SHA256)
    for text in [url, *texts, str(cached_path(url)), "or pass its path"]:
        assert text in str(raised.value)
    assert len(server.requests) == num_requests
    assert cached_names(cache) == []


def refused_connection(monkeypatch) -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}/w.pth"


def unknown_host(monkeypatch) -> str:
    def lookup(*args, **kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    return "https://wights.org/w.pth"


def bad_certificate(monkeypatch) -> str:
    def connect(*args):
        error = ssl.SSLCertVerificationError(1, "")
        error.verify_message = "self-signed certificate"
        raise error

    monkeypatch.setattr("http.client.HTTPSConnection.connect", connect)
    return "https://wights.org/w.pth"


UNREACHABLE = {
    refused_connection: ["no connection to 127.0.0.1", "refused"],
    unknown_host: ["wights.org is not known", "check the network and the URL"],
    bad_certificate: ["wights.org cannot be verified (self-signed certificate)", "SSL_CERT_FILE"],
}


@pytest.mark.parametrize(("failure", "texts"), UNREACHABLE.items())
def test_download_from_an_unreachable_server(failure, texts, cache, monkeypatch):
    url = failure(monkeypatch)
    with pytest.raises(WeightsError) as raised:
        download(url)
    for text in [url, *texts, str(cached_path(url))]:
        assert text in str(raised.value)
    assert cached_names(cache) == []


def test_download_times_out_on_a_silent_server(server, cache, monkeypatch):
    monkeypatch.setattr(http, "TIMEOUT", 0.02)
    url = put(server, Answer(CONTENT))
    server.hold()
    with pytest.raises(WeightsError, match=r"did not answer within 0\.02 seconds, 4 times"):
        download(url)
    assert cached_names(cache) == []


def test_download_checks_disk_space_first(server, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(WeightsError, match=r"needs 1 MB and .*cache has 0 MB left\. JAXFT_CACHE"):
        download(put(server, Answer(CONTENT)))
    assert cached_names(cache) == []


def test_download_on_a_disk_that_fills_up(server, cache, monkeypatch):
    def fsync(fd):
        raise OSError(28, "No space cached_names on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(
        WeightsError, match=r"No space cached_names on device. JAXFT_CACHE can name"
    ):
        download(put(server, Answer(CONTENT)))
    assert cached_names(cache) == []


def test_download_into_a_cache_that_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match=r"File exists.*JAXFT_CACHE can name another"):
        download("https://host.invalid/w.pth")


@pytest.mark.parametrize("url", ["http://a.org/w.pth", "ftp://a.org/w", "file:///etc/passwd"])
def test_download_refuses_unencrypted_urls(url):
    with pytest.raises(WeightsError, match="give an https:// URL"):
        download(url)


def test_download_shows_a_progress_bar_on_a_terminal(server, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    monkeypatch.setattr(progress, "_BAR_SECONDS", 0)
    download(put(server, Answer(CONTENT)))
    out, err = capsys.readouterr()
    assert out == ""
    assert "w.pth" in err
    assert "1.0/1.0 MB" in err


def start_python(code: str, *args: str) -> subprocess.Popen:
    imports = (
        "import sys; from jaxft.weights import download as module; url, sha256 = sys.argv[1:]\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", imports + code, *args], stderr=subprocess.PIPE, text=True
    )


KILL_HALF_WAY = """
import os, signal
from jaxft.progress import Work
def kill(self, done, total):
    if done >= total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
Work.update = kill
module.download(url, sha256=sha256)
"""


@pytest.mark.slow
def test_download_by_two_processes_after_a_killed_one(server, cache):
    url = put(server, Answer(CONTENT))
    with start_python(KILL_HALF_WAY, url, SHA256) as killed:
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert cached_names(cache) == [f"{cached_path(url).name}.part"]

    server.requests.clear()
    server.reached.clear()
    server.hold()
    with start_python("module.download(url, sha256=sha256)", url, SHA256) as first:
        assert server.reached.wait(30)
        with start_python("module.download(url, sha256=sha256)", url, SHA256) as second:
            assert "waiting for another process" in second.stderr.readline()
            server.released.set()
            assert second.communicate()[1] == ""
        assert first.communicate()[1] == ""
    assert (first.returncode, second.returncode) == (0, 0)
    assert server.ranges() == [FROM_HALF]
    assert cached_names(cache) == [cached_path(url).name]
    assert cached_path(url).read_bytes() == CONTENT
