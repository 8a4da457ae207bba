"""Google Cloud Storage on 127.0.0.1: as much of its JSON API as a run needs.

https://cloud.google.com/storage/docs/json_api: list, get, insert (in one request, and resumable),
delete, move; each object with its generation and the conditions on it.
"""

import base64
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from threading import Lock, Thread
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Bucket:
    """The objects by name, as (content, generation), and the requests.

    Names that start with `forbidden/` may not be listed.
    """

    url: str
    name: str = "bucket"
    objects: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


@contextmanager
def serve() -> Iterator[Bucket]:
    """One bucket, until the end of the block."""
    generations, lock, uploads = count(1), Lock(), {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self):
            parts = urlsplit(self.path)
            path, query = parts.path, {k: v[0] for k, v in parse_qs(parts.query).items()}
            bucket.requests.append(f"{self.command} {path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            with lock:
                self.answer(path, query, body)

        do_GET = do_POST = do_PUT = do_DELETE = handle_any  # noqa: N815

        def answer(self, path, query, body):
            if path.endswith("storageLayout"):
                return self.reply({"locationType": "region"})
            if "upload_id" in query:  # the whole of a resumable upload
                return self.insert(uploads[query["upload_id"]], body, query)
            place = re.fullmatch(
                rf"/(upload/|download/)?storage/v1/b/{bucket.name}(/o(/.*)?)?", path
            )
            if not place:
                return self.reply({"error": f"no {path}"}, status=404)
            if not place[2]:
                return self.reply({"kind": "storage#bucket", "name": bucket.name})
            if place[3]:
                return self.one(place[3][1:], query, path.startswith("/download"))
            if self.command == "GET":
                return self.list(query)
            return self.upload(query, body)

        def upload(self, query, body):
            kind = self.headers.get("Content-Type", "")
            if query.get("uploadType") == "multipart":
                boundary = re.search("boundary=['\"]?([^'\";]*)", kind)[1].encode()
                about, content = body.split(b"--" + boundary)[1:3]
                about = json.loads(re.split(b"\r?\n\r?\n", about, maxsplit=1)[1])
                content = re.split(b"\r?\n\r?\n", content, maxsplit=1)[1]
                newline = 2 if content.endswith(b"\r\n") else 1
                return self.insert(about["name"], content[:-newline], query)
            if query.get("uploadType") == "resumable":
                name = query.get("name") or json.loads(body)["name"]
                uploads[str(len(uploads))] = name
                where = f"{bucket.url}/upload/storage/v1/b/x/o?upload_id={len(uploads) - 1}"
                return self.reply({}, headers={"Location": where})
            return self.insert(query["name"], body, query)

        def insert(self, name, content, query):
            if self.fails(name, query):
                return
            bucket.objects[name] = (content, next(generations))
            self.reply(about(name))

        def one(self, name, query, download):
            source, moved, target = name.partition("/moveTo/o/")
            source, target = unquote(source), unquote(target)
            if self.fails(source, query):
                return
            if source not in bucket.objects:
                return self.reply({"error": {"code": 404, "message": "No such object"}}, status=404)
            content, generation = bucket.objects[source]
            if self.command == "DELETE":
                del bucket.objects[source]
                return self.reply(b"", status=204)
            if moved:
                bucket.objects[target] = (bucket.objects.pop(source)[0], next(generations))
                return self.reply(about(target))
            if not (download or query.get("alt") == "media"):
                return self.reply(about(source))
            headers, status = {"x-goog-generation": str(generation)}, 200
            if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(asked[1]), int(asked[2] or len(content) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
                content, status = content[first : last + 1], 206
            return self.reply(content, status=status, headers=headers)

        def fails(self, name, query):
            """Whether a condition on the object's generation is not met; then it has answered."""
            generation = bucket.objects.get(name, (b"", 0))[1]
            if int(query.get("ifGenerationMatch", generation)) != generation:
                self.reply({"error": {"code": 412, "message": "conditionNotMet"}}, status=412)
                return True
            if int(query.get("ifGenerationNotMatch", -1)) == generation and generation:
                self.reply(b"", status=304)
                return True
            return False

        def list(self, query):
            prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
            if prefix.startswith("forbidden/"):
                message = "the account does not have storage.objects.list access"
                return self.reply({"error": {"code": 403, "message": message}}, status=403)
            first, size = int(query.get("pageToken", 0)), int(query.get("maxResults", 1000))
            items, prefixes = [], set()
            for name in sorted(bucket.objects):
                if name.startswith(prefix):
                    inner, cut, _ = name[len(prefix) :].partition(delimiter or "\0")
                    if cut and delimiter:
                        prefixes.add(prefix + inner + delimiter)
                    else:
                        items.append(about(name))
            page = {"items": items[first : first + size], "prefixes": sorted(prefixes)}
            if len(items) > first + size:
                page["nextPageToken"] = str(first + size)
            self.reply({"kind": "storage#objects", **page})

        def reply(self, content, *, status=200, headers=None):
            if not isinstance(content, bytes):
                content = json.dumps(content).encode()
                headers = {"Content-Type": "application/json", **(headers or {})}
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    def about(name):
        content, generation = bucket.objects[name]
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": bucket.name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "updated": "2024-01-01T00:00:00.000Z",
            "timeCreated": "2024-01-01T00:00:00.000Z",
            "etag": base64.b64encode(str(zlib.crc32(content)).encode()).decode(),
        }

    class Threads(ThreadingHTTPServer):
        daemon_threads = True  # clients keep their connections

        def handle_error(self, request, client_address):
            pass  # until they are killed

    with Threads(("127.0.0.1", 0), Handler) as http:
        bucket = Bucket(f"http://127.0.0.1:{http.server_port}")
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield bucket
        finally:
            http.shutdown()
            thread.join()
