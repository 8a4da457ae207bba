"""Local web server with scripted responses and failures."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread


@dataclass
class Answer:
    """Response to requests of a path.

    Attributes:
      breaks: Bytes after which each of the next responses breaks off.
      statuses: HTTP status codes of the next responses, before those with the content.
      length: Wrong Content-Length to claim.
      ranges: Supports range requests.
    """

    content: bytes = b""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    breaks: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    length: int | None = None
    ranges: bool = True


@dataclass
class Server:
    """Running server.

    Attributes:
      url: Root URL.
      answers: Response by path.
      requests: (method, path, headers) of the requests so far.
      reached: Set when a request arrives.
      released: Requests wait while this is not set.
    """

    url: str
    answers: dict[str, Answer]
    requests: list[tuple[str, str, Mapping[str, str]]] = field(default_factory=list)
    reached: Event = field(default_factory=Event)
    released: Event = field(default_factory=Event)

    def hold(self) -> None:
        """Makes all later requests wait for `released`."""
        self.released.clear()

    def ranges(self) -> list[str | None]:
        """Returns the Range header of each GET."""
        return [headers.get("Range") for method, _, headers in self.requests if method == "GET"]


@contextmanager
def serve(answers: dict[str, Answer]) -> Iterator[Server]:
    """Runs the server and its threads until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.requests.append((self.command, self.path, dict(self.headers)))
            server.reached.set()
            server.released.wait(20)
            with suppress(ConnectionError):  # the client was killed or timed out
                self._answer(server.answers.get(self.path.partition("?")[0]))

        do_HEAD = do_GET  # noqa: N815

        def _answer(self, answer: Answer | None):
            answer = answer or Answer(status=404)
            content, status, headers = answer.content, answer.status, dict(answer.headers)
            requested = self.headers.get("Range")
            is_same_version = self.headers.get("If-Range") in (None, headers.get("ETag"))
            if self.command == "GET" and answer.statuses:
                content, status = b"", answer.statuses.pop(0)
            elif requested and answer.ranges and is_same_version:
                start = int(requested.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    headers["Content-Range"] = f"bytes */{len(content)}"
                    content, status = b"", 416
                else:
                    headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
                    content, status = content[start:], 206
            length = len(content) if answer.length is None else answer.length
            self.send_response(status)
            for name, value in {"Content-Length": str(length), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content[: answer.breaks.pop(0)] if answer.breaks else content)

        def log_message(self, *args):
            pass

    class Threads(ThreadingHTTPServer):
        daemon_threads = False  # so that `server_close` joins them

    with Threads(("127.0.0.1", 0), Handler) as http:
        server = Server(f"http://127.0.0.1:{http.server_port}", answers)
        server.released.set()
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.released.set()
            http.shutdown()
            thread.join()
