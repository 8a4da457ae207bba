"""In-memory Hugging Face hub on this machine: creates, stores and serves repositories of models."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKEN = "hf_write"


@dataclass
class Repository:
    """A repository.

    Attributes:
      visibility: as in the request that created it.
      files: content by name.
      commits: messages of the commits.
      license: in the metadata of the card.
    """

    visibility: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    license: str | None = None

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr((self.commits, sorted(self.files.items()))).encode()).hexdigest()


@dataclass
class Hub:
    """The running server.

    Attributes:
      url: root URL.
      repositories: repositories by `OWNER/NAME`.
      objects: content in large file storage, by sha256.
      refusals: status and message for paths that begin with the key.
    """

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict)


@contextmanager
def run_hub() -> Iterator[Hub]:
    """Runs the server until the end of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content=b"", status=200, headers=None):
            body = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def fail(self, status, code, message):
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self.answer({"error": message}, status, headers)

        def handle_request(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            path = self.path.partition("?")[0]
            for prefix, (status, message) in hub.refusals.items():
                if path.startswith(prefix):
                    return self.fail(status, "", message)
            if self.command == "PUT":
                hub.objects[path.rpartition("/")[2]] = body
                return self.answer()
            if path.startswith("/objects/"):
                return self.answer(hub.objects[path.rpartition("/")[2]])
            if path == "/api/validate-yaml":
                return self.answer({"warnings": [], "errors": []})
            if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.fail(401, "", "Invalid username or password.")
            if path == "/api/repos/create":
                fields = json.loads(body)
                repo = f"{fields['organization']}/{fields['name']}"
                hub.repositories[repo] = Repository(fields.get("visibility"))
                return self.answer({"url": f"{hub.url}/{repo}"})
            parts = path.removeprefix("/api/models").strip("/").split("/")
            repo = "/".join(parts[:2]).removesuffix(".git")
            if repo not in hub.repositories:
                return self.fail(404, "RepoNotFound", "Repository not found")
            return self.of_repository(repo, hub.repositories[repo], parts[2:], body)

        def of_repository(self, repo, repository, action, body):
            if action[:1] in ([], ["revision"]):
                siblings = [{"rfilename": name} for name in repository.files]
                fields = {"id": repo, "sha": repository.sha, "siblings": siblings}
                return self.answer({**fields, "cardData": {"license": repository.license}})
            if action[0] == "preupload":
                files = json.loads(body)["files"]
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                    }
                    for file in files
                ]
                return self.answer({"files": modes})
            if action[0] == "info":
                objects = [
                    {**each, "actions": {"upload": {"href": f"{hub.url}/objects/{each['oid']}"}}}
                    for each in json.loads(body)["objects"]
                ]
                kind = {"Content-Type": "application/vnd.git-lfs+json"}
                return self.answer({"transfer": "basic", "objects": objects}, headers=kind)
            if action[0] == "commit":
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        repository.commits.append(value["summary"])
                    elif line["key"] == "file":
                        repository.files[value["path"]] = base64.b64decode(value["content"])
                    else:
                        repository.files[value["path"]] = hub.objects[value["oid"]]
                oid = repository.sha
                url = f"{hub.url}/{repo}/commit/{oid}"
                return self.answer({"success": True, "commitOid": oid, "commitUrl": url})
            content = repository.files.get("/".join(action[2:]))
            if content is None:
                return self.fail(404, "EntryNotFound", "Entry not found")
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self.answer(content, headers={"X-Repo-Commit": repository.sha, "ETag": etag})

        do_GET = do_HEAD = do_POST = do_PUT = handle_request  # noqa: N815

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        hub.url = f"http://127.0.0.1:{http.server_port}"
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield hub
        finally:
            http.shutdown()
            thread.join()
