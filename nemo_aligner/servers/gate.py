"""HTTP reverse proxy in front of Triton that rejects requests which would crash it.

The Triton server inside PyTriton 0.7.0 (2.51) allocates whatever size a JSON header declares and parses JSON
recursively, so a hundred bytes can crash the process and with it the requests of every other client. Here headers are
parsed, bounded and re-serialized before Triton reads them. Removal: once Triton survives the requests in
tests/distributed/test_reward_server.py by itself.
"""

import http.client
import json
import math
import re
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer

MAX_BODY_BYTES = 128 * 2**20
MAX_HEADER_BYTES = 32 * 2**20  # tensors written as JSON are part of the header
MAX_DIMENSIONS = 8
IDLE_TIMEOUT_S = 600
LINGER_S = 2.0
HEADER_SIZE = "Inference-Header-Content-Length"


class Refused(Exception):
    """A request that is not forwarded to Triton."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Gate(ThreadingTCPServer):
    """Serves the health, model and inference routes of one model, whose Triton server listens on a loopback port.

    The constructor binds the public port; connections are refused until `running`.
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str, port: int, model_name: str):
        model = rf"/v2/models/{re.escape(model_name)}(/versions/[0-9]+)?"
        self.get_route = re.compile(rf"/v2(/health/(live|ready))?/?|{model}(/(ready|config|stats))?/?")
        self.post_route = re.compile(rf"{model}/infer/?")
        super().__init__((address, port), _Handler, bind_and_activate=False)
        self.server_bind()

    @contextmanager
    def running(self, triton_port: int):
        """Accept requests, in threads, within the context."""
        self.triton_port = triton_port
        self.server_activate()
        thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.shutdown()
            thread.join()

    def handle_error(self, request, client_address) -> None:
        """Ignore clients that disconnect."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = IDLE_TIMEOUT_S
    disable_nagle_algorithm = True
    server: Gate

    def do_GET(self):
        self._answer(self._get)

    def do_POST(self):
        self._answer(self._infer)

    def log_message(self, *args) -> None:
        """Requests are not logged."""

    def _answer(self, ask) -> None:
        self._body_is_read = False
        try:
            status, headers, body = ask()
        except Refused as refused:
            status, headers, body = refused.status, {}, json.dumps({"error": str(refused)}).encode()
        self.send_response(status)
        for name in ("Content-Type", HEADER_SIZE):
            if headers.get(name) is not None:
                self.send_header(name, headers[name])
        self.send_header("Content-Length", str(len(body)))
        self.close_connection = self.close_connection or not self._body_is_read
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)
        if not self._body_is_read:
            self._linger()

    def _linger(self) -> None:
        """Drain what the client is still sending: closing at once would discard the answer in flight."""
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(LINGER_S)
        give_up = time.monotonic() + LINGER_S
        while time.monotonic() < give_up and self.connection.recv(2**16):
            pass

    def _get(self):
        if not self.server.get_route.fullmatch(self.path):
            raise Refused(404, "there is nothing here")
        self._read_body()
        return self._ask_triton("GET", None, {})

    def _infer(self):
        if not self.server.post_route.fullmatch(self.path):
            raise Refused(404, "there is nothing here")
        body = self._read_body()
        header, payload = split_body(body, self.headers.get(HEADER_SIZE))
        header = check_header(header, len(body))
        return self._ask_triton("POST", header + payload, {HEADER_SIZE: str(len(header))})

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") or self.headers.get("Content-Encoding"):
            raise Refused(415, "send the body as it is, with its Content-Length")
        declared = self.headers.get("Content-Length", "0")
        size = int(declared) if re.fullmatch(r"[0-9]{1,18}", declared) else -1
        if size < 0:
            raise Refused(400, "Content-Length must be a number")
        if size > MAX_BODY_BYTES:
            raise Refused(413, f"the body has {size} bytes, of at most {MAX_BODY_BYTES}")
        body = self.rfile.read(size)
        if len(body) < size:
            raise Refused(400, f"the body ends after {len(body)} of {size} bytes")
        self._body_is_read = True
        return body

    def _ask_triton(self, method: str, body: bytes | None, headers: dict):
        connection = http.client.HTTPConnection("127.0.0.1", self.server.triton_port)
        try:
            connection.request(method, self.path, body, headers)
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        except (OSError, http.client.HTTPException):
            raise Refused(503, "the server has stopped") from None
        finally:
            connection.close()


def split_body(body: bytes, header_size: str | None) -> tuple[bytes, bytes]:
    """The JSON header and the binary tensors after it; without `header_size` the whole body is the header.

    Raises:
        Refused: the size is not a number or exceeds the body.
    """
    if header_size is None:
        header_size = str(len(body))
    size = int(header_size) if re.fullmatch(r"[0-9]{1,18}", header_size) else -1
    if not 0 < size <= len(body):
        raise Refused(400, f"{HEADER_SIZE} must lie in 1..{len(body)}, the size of the body")
    if size > MAX_HEADER_BYTES:
        raise Refused(413, f"the JSON header has {size} bytes, of at most {MAX_HEADER_BYTES}; send tensors in binary")
    return body[:size], body[size:]


def check_header(text: bytes, body_size: int) -> bytes:
    """Refuse a header that declares more than the body can hold; return it re-serialized unambiguously.

    Raises:
        Refused: it is not JSON, or declares no inputs, or one that is empty or larger than `body_size` elements.
    """
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        raise Refused(400, "the header is not JSON") from None
    tensors = header.get("inputs") if isinstance(header, dict) else None
    if not isinstance(tensors, list) or not tensors or not all(isinstance(tensor, dict) for tensor in tensors):
        raise Refused(400, "the header must list inputs")
    for tensor in tensors:
        shape = tensor.get("shape")
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(type(size) is int for size in shape):
            raise Refused(400, "each input needs a shape, a list of whole numbers")
        if any(size < 1 for size in shape) or math.prod(shape) > body_size:
            raise Refused(400, f"an input declares the shape {shape}, the body has {body_size} bytes")
    return json.dumps(header).encode()
