"""Serves a classifier over HTTP: receives an image, answers with class probabilities as JSON.

    python scripts/serve.py runs/ants --port 8000
    curl --data-binary @photo.jpg http://127.0.0.1:8000

A minimal example for one machine, which answers one request after the other.
"""

import argparse
from http.server import BaseHTTPRequestHandler, HTTPServer
from json import dumps

import numpy as np

import jaxft
from jaxft.data.decode import decode


def make_server(source: str, port: int) -> HTTPServer:
    """Loads the classifier and binds the port on this machine; 0 chooses a free one."""
    classifier = jaxft.Classifier.load(source, batch_size=1)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            try:
                image = decode(self.rfile.read(int(self.headers.get("Content-Length", 0))))
                status, answer = 200, dict(classifier.predict(np.asarray(image)[None]).top(5)[0])
            except ValueError as error:
                status, answer = 400, {"error": str(error)}
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(dumps(answer).encode())

    return HTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="a run, an export, hf:OWNER/NAME, ...")
    parser.add_argument("--port", type=int, default=8000)
    known = parser.parse_args()
    with make_server(known.source, known.port) as server:
        print(f"http://127.0.0.1:{server.server_port}", flush=True)
        server.serve_forever()
