"""Every way a download goes wrong: the right file in the end, or a sentence and no file at all."""

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

from jaxft.errors import WeightsError
from jaxft.weights import download as module
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
    monkeypatch.setattr(module, "RETRY_DELAY", 0)
    return tmp_path / "cache"


@pytest.fixture
def server():
    with serve({}) as server:
        yield server


def put(server: Server, answer: Answer) -> str:
    fresh = {"breaks": [*answer.breaks], "statuses": [*answer.statuses]}  # it uses them up
    server.answers["/w.pth"] = replace(answer, **fresh)
    return f"{server.url}/w.pth"


def left(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


# An answer, whether the caller has a hash, and the parts that the requests must ask for.
FROM_HALF = f"bytes={HALF}-"
GOOD = {
    "at once": (Answer(CONTENT), True, [None]),
    "without a hash": (Answer(CONTENT), False, [None]),
    "redirected": (Answer(status=302, headers={"Location": "/elsewhere"}), True, [None, None]),
    "broken once": (Answer(CONTENT, breaks=[HALF]), True, [None, FROM_HALF]),
    "broken, by its etag": (Answer(CONTENT, headers=ETAG, breaks=[HALF]), False, [None, FROM_HALF]),
    "broken, nothing to tell": (Answer(CONTENT, breaks=[HALF]), False, [None, None]),
    "weak etag": (Answer(CONTENT, headers={"ETag": 'W/"a"'}, breaks=[9]), False, [None, None]),
    "broken, no ranges": (Answer(CONTENT, breaks=[HALF], ranges=False), True, [None, FROM_HALF]),
    "broken often": (
        Answer(CONTENT, breaks=[9] * 9),
        True,
        [None, *(f"bytes={9 * i}-" for i in range(1, 10))],
    ),
    "busy": (Answer(CONTENT, statuses=[503, 429, 500]), True, [None] * 4),
}


@pytest.mark.parametrize(("answer", "has_hash", "parts"), GOOD.values(), ids=GOOD)
def test_ends_with_the_file(answer, has_hash, parts, server, cache, capsys):
    server.answers["/elsewhere"] = Answer(CONTENT)
    url = put(server, answer)
    path = download(url, sha256=SHA256[:8] if has_hash else None)
    assert path.read_bytes() == CONTENT
    assert server.ranges() == parts
    assert left(cache) == [path.name]
    assert path.name.endswith("-w.pth")
    assert capsys.readouterr() == ("", "")  # no bar where nobody looks


def test_a_cached_file_needs_no_server(cache):
    with serve({}) as server:
        url = put(server, Answer(CONTENT))
        path = download(url, sha256=SHA256)
    assert download(url, sha256=SHA256) == path
    assert download(url) == path


def test_a_copy_by_hand_serves(cache):
    url = "https://host.invalid/w.pth"
    cached_path(url).parent.mkdir()
    cached_path(url).write_bytes(CONTENT)
    assert download(url, sha256=SHA256) == cached_path(url)


def test_a_damaged_cached_file_comes_anew(server):
    url = put(server, Answer(CONTENT))
    path = download(url, sha256=SHA256)
    path.write_bytes(OTHER)
    assert download(url, sha256=SHA256).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("part", "parts"),
    [
        (CONTENT[:HALF], [FROM_HALF]),
        (CONTENT, []),
        (OTHER[:HALF], [FROM_HALF, None]),
        (CONTENT + b"x", [f"bytes={len(CONTENT) + 1}-", None]),  # HTTP 416
    ],
    ids=["begun", "whole", "of another file", "too long"],
)
def test_goes_on_from_what_a_killed_process_left(part, parts, server, cache):
    url = put(server, Answer(CONTENT))
    cache.mkdir()
    cached_path(url).with_name(f"{cached_path(url).name}.part").write_bytes(part)
    assert download(url, sha256=SHA256).read_bytes() == CONTENT
    assert server.ranges() == parts
    assert len(left(cache)) == 1


def test_no_two_urls_share_a_file():
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
def test_the_cache_is_where_the_environment_says(variables, folder, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(module.cache_folder()) == folder


# An answer, the number of requests it is worth, and what the error must say.
BAD = {
    "wrong hash": (Answer(OTHER), 1, ["sha256 is", f"begin with {SHA256}", "Run again"]),
    "broken always": (Answer(CONTENT, breaks=[0] * 9), 4, ["ended after 0 of", "4 times"]),
    "always as far": (Answer(CONTENT, breaks=[9] * 9, ranges=False), 4, ["ended after 9 of"]),
    "too short": (Answer(CONTENT, length=9), 1, ["sha256 is"]),
    "too long": (Answer(CONTENT, length=HALF * 3, ranges=False), 4, ["1,048,576 of 1,572,864"]),
    "missing": (Answer(status=404), 1, ["no such file (HTTP 404", "check the URL"]),
    "forbidden": (Answer(status=403), 1, ["refuses it (HTTP 403", "login"]),
    "a teapot": (Answer(status=418), 1, ["HTTP 418"]),
    "down": (Answer(status=503), 4, ["trouble (HTTP 503", "4 times", "later"]),
    "unencrypted": (
        Answer(status=302, headers={"Location": "http://a.org/w"}),
        1,
        ["sends on to http://a.org/w", "not encrypted"],
    ),
}


@pytest.mark.parametrize(("answer", "requests", "said"), BAD.values(), ids=BAD)
def test_ends_with_a_sentence_and_no_file(answer, requests, said, server, cache):
    url = put(server, answer)
    with pytest.raises(WeightsError) as raised:
        download(url, sha256=SHA256)
    for words in [url, *said, str(cached_path(url)), "by its own path"]:
        assert words in str(raised.value)
    assert len(server.requests) == requests
    assert left(cache) == []


def refuse(monkeypatch) -> str:
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
    refuse: ["no connection to 127.0.0.1", "refused"],
    unknown_host: ["wights.org is not known", "slip in the URL"],
    bad_certificate: ["prove who it is (self-signed certificate)", "SSL_CERT_FILE"],
}


@pytest.mark.parametrize(("how", "said"), UNREACHABLE.items())
def test_unreachable(how, said, cache, monkeypatch):
    url = how(monkeypatch)
    with pytest.raises(WeightsError) as raised:
        download(url)
    for words in [url, *said, str(cached_path(url))]:
        assert words in str(raised.value)
    assert left(cache) == []


def test_a_silent_server_is_left(server, cache, monkeypatch):
    monkeypatch.setattr(http, "TIMEOUT", 0.02)
    url = put(server, Answer(CONTENT))
    server.hold()
    with pytest.raises(WeightsError, match=r"does not answer within 0\.02 seconds, 4 times"):
        download(url)
    assert left(cache) == []


def test_a_full_disk_is_foreseen(server, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(WeightsError, match=r"needs 1 MB and .*cache has 0 MB left\. JAXFT_CACHE"):
        download(put(server, Answer(CONTENT)))
    assert left(cache) == []


def test_a_disk_that_fills_up_meanwhile(server, cache, monkeypatch):
    def fsync(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(WeightsError, match=r"No space left on device. JAXFT_CACHE can name"):
        download(put(server, Answer(CONTENT)))
    assert left(cache) == []


def test_a_cache_that_is_none(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("JAXFT_CACHE", str(tmp_path / "file"))
    with pytest.raises(WeightsError, match=r"File exists.*JAXFT_CACHE can name another"):
        download("https://host.invalid/w.pth")


@pytest.mark.parametrize("url", ["http://a.org/w.pth", "ftp://a.org/w", "file:///etc/passwd"])
def test_only_what_is_encrypted_or_local(url):
    with pytest.raises(WeightsError, match="give an https:// URL"):
        download(url)


def test_a_bar_on_a_terminal(server, monkeypatch, capsys):
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    download(put(server, Answer(CONTENT)))
    out, err = capsys.readouterr()
    assert out == ""
    assert "w.pth" in err
    assert "1.0/1.0 MB" in err


def python(code: str, *args: str) -> subprocess.Popen:
    head = "import sys; from jaxft.weights import download as module; url, sha256 = sys.argv[1:]\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *args], stderr=subprocess.PIPE, text=True
    )


KILL_HALF_WAY = """
import contextlib, os, signal
def show(done, total):
    if done >= total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
module._progress = lambda name: contextlib.nullcontext(show)
module.download(url, sha256=sha256)
"""


@pytest.mark.slow
def test_a_killed_process_and_two_at_once(server, cache):
    url = put(server, Answer(CONTENT))
    with python(KILL_HALF_WAY, url, SHA256) as killed:
        killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    assert left(cache) == [f"{cached_path(url).name}.part"]

    server.requests.clear()
    server.reached.clear()
    server.hold()
    with python("module.download(url, sha256=sha256)", url, SHA256) as first:
        assert server.reached.wait(30)
        with python("module.download(url, sha256=sha256)", url, SHA256) as second:
            assert "waiting for another process" in second.stderr.readline()
            server.released.set()
            assert second.communicate()[1] == ""
        assert first.communicate()[1] == ""
    assert (first.returncode, second.returncode) == (0, 0)
    assert server.ranges() == [FROM_HALF]
    assert left(cache) == [cached_path(url).name]
    assert cached_path(url).read_bytes() == CONTENT
