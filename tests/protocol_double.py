"""A double of a server of the Open Inference Protocol, for what a client makes of errors; no test of a server."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Iterator

HTML = b"<!DOCTYPE html><html><body>502 Bad Gateway</body></html>"


@dataclass
class Double:
    """What the double says; tests change it while it runs.

    Attributes:
        answer: from rows to an array for each output.
        name: of its only model.
        shapes: of input and outputs, with their types.
        extensions: that it says it has.
        parameters: of the model's configuration, where it has that extension.
        index: the models that it lists, where it has that extension.
        broken: what is wrong with its answers; empty for nothing.
        url: where it is.
        asked: paths of the requests.
    """

    answer: Callable[[NDArray[Any]], dict[str, NDArray[Any]]]
    name: str
    given: dict[str, Any]
    gives: list[dict[str, Any]]
    extensions: list[str] = field(default_factory=lambda: ["binary_tensor_data"])
    parameters: dict[str, str] = field(default_factory=dict)
    index: list[dict[str, str]] = field(default_factory=list)
    broken: str = ""
    url: str = ""
    asked: list[str] = field(default_factory=list)

    def metadata(self, path: str) -> Any:
        """Content for a GET; ``None`` for what is not there."""
        if path == "/v2":
            return {"name": "double", "version": "1", "extensions": self.extensions}
        model = f"/v2/models/{self.name}"
        if path == f"{model}/config":
            return {"max_batch_size": 4, "parameters": {k: {"string_value": v} for k, v in self.parameters.items()}}
        if path in (model, f"{model}/versions/3"):
            return {
                "name": self.name,
                "versions": ["3"],
                "platform": "x",
                "inputs": [self.given],
                "outputs": self.gives,
            }
        return None


def _handler(double: Double) -> type[BaseHTTPRequestHandler]:  # noqa: C901 - one class
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def send(self, body: bytes, status: int = 200, **headers: object) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": len(body), **headers}.items():
                self.send_header(key.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            double.asked.append(self.path)
            if double.broken == "html":
                self.send(HTML)
            elif double.broken == "html 502":
                self.send(HTML, 502)
            elif double.broken == "list":
                self.send(b"[1, 2]")
            elif double.broken == "drip":
                self.drip()
            elif double.broken == "models" and self.path != "/v2":
                self.send(b'{"error": "CUDA out of memory"}', 500)
            elif (content := double.metadata(self.path)) is None:
                self.send(b'{"error": "Request for unknown model: \'x\' is not found"}', 400)
            else:
                self.send(json.dumps(content).encode())

        def drip(self) -> None:
            """Send a byte now and then, which no time-out of a socket ends."""
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            for _ in range(100):
                try:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                except OSError:
                    return
                time.sleep(0.1)

        def do_POST(self) -> None:
            double.asked.append(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v2/repository/index":
                self.send(b'{"error": "broken"}' if double.broken == "index" else json.dumps(double.index).encode())
                return
            length = self.headers.get("Inference-Header-Content-Length")
            request = json.loads(body if length is None else body[: int(length)])
            (tensor,) = request["inputs"]
            if length is None:
                rows = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
            else:
                rows = np.frombuffer(body[int(length) :], np.float32).reshape(tensor["shape"])
            if double.broken == "infer html":
                self.send(HTML)
            elif double.broken == "infer refuses":
                self.send(b'{"error": "the model is out of memory\\nreally"}', 500)
            elif double.broken == "infer drip":
                self.drip()
            elif double.broken == "infer 302":
                self.send(b"", 302, Location="/elsewhere")
            elif double.broken == "infer upstream":
                self.send(b'{"error": "the upstream request timed out"}', 503)
            elif double.broken == "infer cut":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b"{")
                self.close_connection = True
            else:
                wanted = [one["name"] for one in request.get("outputs", double.gives)]
                self.send_answer(
                    {k: v for k, v in double.answer(rows).items() if k in wanted}, binary=length is not None
                )

        def send_answer(self, arrays: dict[str, NDArray[Any]], *, binary: bool) -> None:
            outputs, tail = [], b""
            for name, array in arrays.items():
                output: dict[str, Any] = {"name": name, "datatype": "FP32", "shape": list(array.shape)}
                data = b"" if double.broken == "infer empty" else array.astype(np.float32).tobytes()
                if binary:
                    output["parameters"] = {"binary_data_size": len(data)}
                    tail += data
                else:
                    output["data"] = array.reshape(-1).tolist()
                outputs.append(output)
            if double.broken == "infer nothing":
                outputs, tail = [], b""
            head = json.dumps({"model_name": double.name, "outputs": outputs}).encode()
            more = {"Inference_Header_Content_Length": len(head)} if binary else {}
            self.send(head + tail, **more)

    return Handler


@contextmanager
def serving(double: Double) -> Iterator[Double]:
    """The double, while it can be asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(double))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    double.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield double
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
