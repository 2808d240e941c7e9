"""A real S3-compatible server on loopback, and a proxy in front of it that goes wrong on command.

`S3Server` is moto's server in a process of its own, so that what it does costs the client no time. `Proxy` forwards HTTP
to any server, records what passes and, while a test runs, spoils answers: see `Proxy.fail`. Fixtures, known to all tests
by ``conftest.py``: ``s3_server``, one a session, and ``s3``, a bucket of the test's own behind a proxy of its own, with
the environment set so that ``s3://`` leads there.
"""

from __future__ import annotations

import http.client
import itertools
import re
import select
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

START = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()  # until the test that started us closes it, or dies
"""


class S3Server:
    """moto on a free port. Use as a context; ``address`` is (host, port)."""

    def __enter__(self) -> S3Server:
        command = [sys.executable, "-c", START]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        port = self.process.stdout.readline()
        assert port, f"moto did not start (exit code {self.process.wait()})"
        self.address = ("127.0.0.1", int(port))
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _ask(address: tuple[str, int], method: str, path: str, body: bytes = b"") -> None:
    connection = http.client.HTTPConnection(*address, timeout=30)
    # moto checks no signature, but without one it takes the request for a stranger's
    signed = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
    connection.request(method, urllib.parse.quote(path), body, {"Authorization": signed})
    answer = connection.getresponse()
    said = answer.read()
    connection.close()
    assert answer.status < 300, f"{method} {path}: {answer.status} {said[:300]!r}"


class Bucket:
    """A bucket as another client sees it, past the proxy."""

    def __init__(self, address: tuple[str, int], name: str):
        self.address, self.name = address, name
        _ask(address, "PUT", f"/{name}")

    def put(self, key: str, data: bytes) -> str:
        """Store an object; its URI."""
        _ask(self.address, "PUT", f"/{self.name}/{key}", data)
        return f"s3://{self.name}/{key}"

    def delete(self, key: str) -> None:
        _ask(self.address, "DELETE", f"/{self.name}/{key}")

    def upload(self, folder: Path, prefix: str = "") -> list[str]:
        """Store every file of a folder and of those below, keys as relative paths behind ``prefix``; their URIs."""
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return [self.put(f"{prefix}{p.relative_to(folder)}", p.read_bytes()) for p in files]


@dataclass
class Request:
    """One request as it passed. ``sent``: bytes of body that went to the client; ``fault``: how it was spoiled."""

    method: str
    path: str  # with the query
    range: str
    status: int = 0
    sent: int = 0
    fault: str = ""


@dataclass
class _Fault:
    mode: str
    times: float
    until: float
    methods: Sequence[str]
    path: str


class Proxy:
    """Forwards to ``upstream``. Use as a context; ``url`` is where clients connect.

    ``requests`` lists what passed, ``most_in_flight`` is the largest number of requests at one time, ``delay`` seconds
    are waited before each is forwarded.
    """

    def __init__(self, upstream: tuple[str, int]):
        self.upstream = upstream
        self.delay = 0.0
        self.requests: list[Request] = []
        self.in_flight = self.most_in_flight = 0
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self._closing = threading.Event()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._server.server_address[:2]
        return str(host), port

    @property
    def url(self) -> str:
        return "http://{}:{}".format(*self.address)

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def fail(
        self,
        mode: str,
        times: float = float("inf"),
        seconds: float = float("inf"),
        methods: Sequence[str] = ("GET",),
        path: str = "",
    ) -> None:
        """Spoil answers, the next ``times`` or those of the next ``seconds``, to ``methods`` whose path matches a regex.

        Modes: a status such as ``500`` (nothing is forwarded); ``hang`` (no answer, until the client hangs up);
        ``stall`` (half of the body, then nothing more); ``refuse`` (the connection is closed before an answer); ``cut``
        (half of the body, then closed); ``reset`` (half of the body, then a TCP reset); ``short`` (half of the body,
        which Content-Length says is all); ``whole`` (the Range header is dropped: the server sends everything).
        """
        with self._lock:
            self._faults.append(_Fault(mode, times, time.monotonic() + seconds, methods, path))

    def heal(self) -> None:
        with self._lock:
            self._faults.clear()

    def clear(self) -> None:
        """Forget what passed so far."""
        with self._lock:
            self.requests.clear()
            self.most_in_flight = self.in_flight

    def passed(self, method: str = "", path: str = "") -> list[Request]:
        with self._lock:
            return [r for r in self.requests if r.method.startswith(method) and re.search(path, r.path)]

    def sent(self, method: str = "", path: str = "") -> int:
        """Bytes of bodies that went to the client."""
        return sum(r.sent for r in self.passed(method, path))

    def _take(self, request: Request) -> str:
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                fits = request.method in fault.methods and re.search(fault.path, request.path)
                if fits and fault.times > 0 and time.monotonic() < fault.until:
                    fault.times -= 1
                    request.fault = fault.mode
                    return fault.mode
        return ""

    def _enter(self, by: int) -> None:
        with self._lock:
            self.in_flight += by
            self.most_in_flight = max(self.most_in_flight, self.in_flight)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64
    proxy: Proxy

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # a client that hung up, which is what many tests make it do


_HOP = ("connection", "expect", "content-length", "transfer-encoding")  # said anew on either side of the proxy


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        proxy = self.server.proxy
        request = Request(self.command, self.path, self.headers.get("Range", ""))
        body = self._body()
        proxy._enter(1)
        try:
            time.sleep(proxy.delay)
            self._forward(proxy, request, proxy._take(request), body)
        finally:
            proxy._enter(-1)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(chunks)

    def _forward(self, proxy: Proxy, request: Request, mode: str, body: bytes) -> None:
        if mode == "refuse":
            self.close_connection = True
            return
        if mode == "hang":
            self._wait(proxy)
            return
        if mode.isdigit():
            request.status = int(mode)
            self.send_response(request.status)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        headers = {k: v for k, v in self.headers.items() if k.lower() not in _HOP}
        if mode == "whole":
            headers.pop("Range", None)
            headers.pop("range", None)
        upstream = http.client.HTTPConnection(*proxy.upstream, timeout=60)
        upstream.request(self.command, self.path, body or None, headers)
        answer = upstream.getresponse()
        data = answer.read()
        upstream.close()
        request.status = answer.status
        length = int(answer.headers.get("Content-Length", len(data))) if self.command == "HEAD" else len(data)
        kept = data[: len(data) // 2] if mode in ("stall", "cut", "reset", "short") else data
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in (*_HOP, "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(kept) if mode == "short" and self.command != "HEAD" else length))
        self.end_headers()
        request.sent = len(kept)
        self.wfile.write(kept)
        if mode == "stall":
            self._wait(proxy)
        if mode == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if mode in ("cut", "reset"):
            self.close_connection = True

    def _wait(self, proxy: Proxy) -> None:
        self.close_connection = True
        while not proxy._closing.wait(0.05):
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                return


@dataclass
class S3:
    """What the fixture gives: the bucket past the proxy, and the proxy that ``s3://`` URIs lead through."""

    bucket: Bucket
    proxy: Proxy


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    with S3Server() as server:
        yield server


_numbers = itertools.count()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with Proxy(s3_server.address) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield S3(Bucket(s3_server.address, f"bucket-{next(_numbers)}"), proxy)
