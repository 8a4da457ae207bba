"""Downloads from the hub, with its real client and a local server."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download
from huggingface_hub.utils import close_session
from server import Answer, Server, serve

from jaxft.errors import WeightsError
from jaxft.weights.hub import fetch

OLD, NEW = "a" * 40, "b" * 40
REPO = "timm/resnet50.a1_in1k"
WEIGHTS = b"weights" * 1000
LARGE = f"/large/{hashlib.sha256(WEIGHTS).hexdigest()}"  # large file storage
CONFIG = json.dumps({"pretrained_cfg": {"input_size": [3, 288, 288]}}).encode()
FILES = {"model.safetensors": WEIGHTS, "config.json": CONFIG, "README.md": b"resnet"}


def error(status: int, code: str) -> Answer:
    return Answer(status=status, headers={"X-Error-Code": code})


def repository(
    server: Server, files: dict[str, bytes], revision: str = "main", commit: str = OLD
) -> None:
    """Adds a repository, with its weights in large file storage."""
    info = {"id": REPO, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
    listing = Answer(json.dumps(info).encode(), headers={"Content-Type": "application/json"})
    storage = server.url.replace("127.0.0.1", "localhost")  # another host for the client
    for name in (revision, commit):
        server.answers[f"/api/models/{REPO}/revision/{name}"] = listing
        for file, content in files.items():
            headers = {"X-Repo-Commit": commit}
            if file.endswith(".json"):
                answer = Answer(content, headers={**headers, "ETag": f'"{"e" * 40}"'})
            else:
                sha256 = hashlib.sha256(content).hexdigest()
                server.answers[f"/large/{sha256}"] = Answer(content)
                linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
                location = {"Location": f"{storage}/large/{sha256}"}
                answer = Answer(status=302, headers={**headers, **linked, **location})
            server.answers[f"/{REPO}/resolve/{name}/{file}"] = answer


@pytest.fixture(autouse=True)
def client(tmp_path, monkeypatch) -> Iterator[None]:
    """Gives the client an empty cache, no token, no retry delay and no monitor thread."""
    cache = tmp_path / "hub"
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(file_download, "time", SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr("tqdm.tqdm.monitor_interval", 0)
    yield
    close_session()


@contextmanager
def endpoint(monkeypatch, files: dict[str, bytes] = FILES) -> Iterator[Server]:
    with serve({}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        repository(server, files)
        yield server
        close_session()


@pytest.fixture
def server(monkeypatch):
    with endpoint(monkeypatch) as server:
        yield server


def gets(server: Server) -> list[str]:
    return [path.rpartition("/")[2] for method, path, _ in server.requests if method == "GET"]


def test_fetch_downloads_weights_and_descriptions(server):
    path = fetch(REPO)
    assert path.read_bytes() == WEIGHTS
    assert path.parent.name == OLD
    assert (path.parent / "config.json").read_bytes() == CONFIG
    assert not (path.parent / "README.md").exists()


@pytest.mark.parametrize(
    ("files", "reference", "name"),
    [
        (["model.safetensors", "pytorch_model.bin"], REPO, "model.safetensors"),
        (["pytorch_model.bin", "model.bin"], REPO, "pytorch_model.bin"),
        (["model.safetensors", "old/w.pth"], f"{REPO}/old/w.pth", "old/w.pth"),
        (["model.safetensors", "w.pth"], f"{REPO}@main/w.pth", "w.pth"),
        (["model.safetensors"], f"//{REPO}", "model.safetensors"),
    ],
)
def test_fetch_chooses_the_file(files, reference, name, monkeypatch):
    with endpoint(monkeypatch, {file: file.encode() for file in files}):
        assert fetch(reference).read_bytes() == name.encode()


def test_fetch_does_not_download_a_cached_file(server):
    path = fetch(REPO)
    server.requests.clear()
    assert fetch(REPO) == path
    assert gets(server) == ["main"]  # only the present commit of the revision


def test_fetch_uses_a_cached_file_offline(monkeypatch):
    with endpoint(monkeypatch):
        path = fetch(REPO)
    assert fetch(REPO) == path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(REPO) == path


def test_fetch_follows_a_branch_but_not_a_commit(server):
    old = fetch(REPO)
    repository(server, {"model.safetensors": b"newer"}, commit=NEW)
    assert fetch(REPO).read_bytes() == b"newer"
    server.requests.clear()
    assert fetch(f"{REPO}@{OLD}") == old
    assert server.requests == []


@pytest.mark.parametrize(
    ("revision", "written"), [("v1", "v1"), ("refs/pr/1", "refs/pr/1"), ("a/b", "a%2Fb")]
)
def test_fetch_of_a_revision(revision, written, server):
    quoted = revision.replace("/", "%2F")
    repository(server, {"w.pth": b"other"}, revision=quoted, commit=NEW)
    path = fetch(f"{REPO}@{written}/w.pth")
    assert (path.read_bytes(), path.parent.name) == (b"other", NEW)


def test_fetch_resumes_a_broken_connection(server):
    server.answers[LARGE].breaks.append(len(WEIGHTS) // 2)
    assert fetch(REPO).read_bytes() == WEIGHTS
    assert [path for _, path, _ in server.requests].count(LARGE) == 2


def cached_weights(folder: Path) -> list[str]:
    """Returns names of complete and incomplete weights in the client's cache."""
    names = (path.name for path in folder.rglob("*"))
    return [n for n in names if n.endswith((".safetensors", ".incomplete")) or len(n) == 64]


def test_fetch_removes_damaged_weights(server, tmp_path):
    server.answers[LARGE].content = WEIGHTS[::-1]
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged.*run again"):
        fetch(REPO)
    assert cached_weights(tmp_path) == []
    server.answers[LARGE].content = WEIGHTS
    assert fetch(REPO).read_bytes() == WEIGHTS


def test_fetch_removes_weights_damaged_in_the_cache(server, tmp_path, monkeypatch):
    path = fetch(REPO)
    path.resolve().write_bytes(b"bit rot")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match="is damaged"):
        fetch(REPO)
    assert cached_weights(tmp_path) == []


API = f"/api/models/{REPO}/revision/main"
STORED = f"/{REPO}/resolve/main/model.safetensors"
# Responses by path, reference, and texts in the error.
REFUSALS = {
    "no repository": (
        {API: error(401, "RepoNotFound")},
        REPO,
        ["no repository", "private", "Check its name", "hf auth login", "HF_TOKEN"],
    ),
    "no revision": ({}, f"{REPO}@v9", ["no revision 'v9'", "/commits/main"]),
    "gated": ({STORED: error(401, "GatedRepo")}, REPO, ["requires consent", "then log in"]),
    "gated, not granted": ({STORED: error(403, "GatedRepo")}, REPO, ["requires consent"]),
    "forbidden": ({API: error(403, "")}, REPO, ["HTTP 403 Forbidden", "Log in with"]),
    "down": ({API: error(503, "")}, REPO, ["HTTP 503", "later", "and pass its path"]),
    "no file": ({}, f"{REPO}/w.bin", ["no w.bin. Name", "It has model.safetensors, config.json"]),
    "near file": ({}, f"{REPO}/modle.safetensors", [f"as in hf:{REPO}/model.safetensors"]),
    "broken": ({LARGE: Answer(WEIGHTS, breaks=[9] * 99)}, REPO, ["cannot be downloaded", "later"]),
    "cut short": ({LARGE: Answer(WEIGHTS[:9])}, REPO, ["cannot be downloaded", "later"]),
}  # fmt: skip


@pytest.mark.parametrize(("answers", "reference", "texts"), REFUSALS.values(), ids=REFUSALS)
def test_fetch_errors(answers, reference, texts, server, tmp_path):
    server.answers[f"/api/models/{REPO}/revision/v9"] = error(404, "RevisionNotFound")
    server.answers |= answers
    with pytest.raises(WeightsError) as raised:
        fetch(reference)
    message = str(raised.value)
    assert message.startswith(f"hf:{REPO}")
    assert "\n" not in message
    for text in texts:
        assert text in message
    assert cached_weights(tmp_path) == []


def test_fetch_without_a_default_file_lists_the_files(monkeypatch):
    files = {"README.md": b"", "resnet.pth": b"", **{f"log{i:02}.txt": b"" for i in range(20)}}
    with endpoint(monkeypatch, files), pytest.raises(WeightsError) as raised:
        fetch(REPO)
    message = str(raised.value)
    assert "no model.safetensors or pytorch_model.bin" in message
    assert f"as in hf:{REPO}/resnet.pth" in message
    assert "It has resnet.pth, README.md, log00.txt" in message
    assert message.endswith("log09.txt and 10 more.")


def test_fetch_without_network_or_cached_file(monkeypatch):
    with endpoint(monkeypatch):
        pass
    with pytest.raises(
        WeightsError, match=r"cannot be downloaded.*ConnectError.*and pass its path"
    ):
        fetch(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        WeightsError, match=r"HF_HUB_OFFLINE is set, and .*/hub holds no model.safe"
    ):
        fetch(REPO)


@pytest.mark.parametrize("reference", ["", "resnet50", "a/b@", "a/b/", "a b/c", "a@b/c", "/a/b"])
def test_fetch_refuses_malformed_references(reference):
    with pytest.raises(WeightsError, match=r"form hf:OWNER/REPO\[@REVISION\].*such as hf:timm/"):
        fetch(reference)


@pytest.mark.parametrize("reference", ["a..b/c", "a/b/../../w.pth", "a/-b"])
def test_fetch_refuses_invalid_names(reference, server):
    with pytest.raises(WeightsError, match=r"^hf:a"):
        fetch(reference)


@pytest.mark.slow
def test_fetch_follows_the_environment(server, tmp_path):
    code = f"from jaxft.weights.hub import fetch; print(fetch('{REPO}'))"
    variables = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "*"}
    env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | variables, capture_output=True, text=True
    )
    path = Path(done.stdout.strip())
    assert path.is_relative_to(tmp_path / "home")
    assert path.read_bytes() == WEIGHTS
    assert done.stderr == ""
