"""A small HTTP server with byte ranges, which also speaks as much of the Hugging Face hub's API as reading and listing use.

``/plain/<path>`` serves ranges, ``/whole/<path>`` does not. A data set's file is at ``/datasets/<owner>/<name>/resolve/
<revision>/<path>``; a tar's bytes lie, as on the hub, on another server (``cdn``), at an address signed for a while. A
model's file is at ``/own/model/resolve/<revision>/<path>``; a weights file's bytes lie elsewhere too, and its tag is its
sha256. The benchmark's files are at ``/datasets/wangyi111/Copernicus-Bench/resolve/<revision>/<path>``, of any revision, and
their bytes elsewhere likewise.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Use as a context. ``files`` are those served, by path; change them as you like. ``cdn`` is where signed addresses
    point to; `expire` makes those given so far invalid. ``tokens`` are the Authorization headers that came, by path.
    ``told`` are sha256 tags of files of the benchmark that are not those of their bytes."""

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.signature = 1
        self.tokens: list[tuple[str, str]] = []
        self.told: dict[str, str] = {}
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.address = ("127.0.0.1", self._server.server_address[1])
        self.cdn = "http://{}:{}".format(*self.address)

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def expire(self) -> None:
        self.signature += 1


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: HubServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server.hub
        path = unquote(urlsplit(self.path).path)
        hub.tokens.append((path, self.headers.get("Authorization", "")))
        resolve = re.fullmatch(r"/datasets/own/set/resolve/(main|v1)/(.+)", path)
        model = re.fullmatch(r"/own/model/resolve/(main|v1|refs/pr/1)/(.+)", path)
        bench = re.fullmatch(r"/datasets/wangyi111/Copernicus-Bench/resolve/[^/]+/(.+)", path)
        tree = re.fullmatch(r"/api/datasets/own/set/tree/main(?:/(.*))?", path)
        if found := re.fullmatch(r"/(?:plain|whole)/(.+)", path):
            self._file(found[1], ranges=path.startswith("/plain"))
        elif found := re.fullmatch(r"/cdn/(\d+)/(.+)", path):
            if int(found[1]) == hub.signature:
                self._file(found[2])
            else:
                self._say(403)
        elif resolve and resolve[2].endswith(".tar") and resolve[2] in hub.files:
            self._say(
                302,
                Location=f"{hub.cdn}/cdn/{hub.signature}/{resolve[2]}?Signature=secret",
                **{"X-Linked-ETag": f'"lfs-{_tag(hub.files[resolve[2]])}"', "X-Repo-Commit": COMMIT},
            )
        elif resolve:
            self._file(resolve[2])
        elif bench and bench[1] in hub.files:
            where = f"{hub.cdn}/cdn/{hub.signature}/{bench[1]}?Signature=secret"
            tag = hub.told.get(bench[1]) or hashlib.sha256(hub.files[bench[1]]).hexdigest()
            self._say(302, Location=where, **{"X-Linked-ETag": f'"{tag}"', "X-Repo-Commit": COMMIT})
        elif model and model[2] in hub.files:
            data = hub.files[model[2]]
            headers = {"X-Repo-Commit": hashlib.sha1(model[1].encode()).hexdigest()}
            if model[2].endswith((".pth", ".safetensors")):
                where = f"{hub.cdn}/cdn/{hub.signature}/{model[2]}?Signature=secret"
                tags = {"X-Linked-ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
                self._say(302, Location=where, **tags, **headers)
            else:
                tag = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
                self._say(200, data, ETag=f'"{tag}"', **headers)
        elif path.startswith("/own/model/resolve/"):
            known = re.match(r"/own/model/resolve/(main|v1|refs/pr/1)/", path)
            self._say(404, **{"X-Error-Code": "EntryNotFound" if known else "RevisionNotFound"})
        elif "/resolve/" in path and not path.startswith("/datasets/"):
            self._say(401, **{"X-Error-Code": "GatedRepo" if path.startswith("/own/gated/") else "RepoNotFound"})
        elif tree:
            self._tree(f"{tree[1]}/" if tree[1] else "")
        elif path.startswith("/api/datasets/own/closed"):
            self._say(403)
        elif re.fullmatch(r"/api/datasets/own/set(/revision/main)?", path):
            self._json({"id": "own/set", "sha": COMMIT, "siblings": [], "private": False, "tags": []})
        else:
            self._say(404)

    def _file(self, name: str, ranges: bool = True) -> None:
        data = self.server.hub.files.get(name)
        if data is None:
            self._say(404, **{"X-Error-Message": "Entry not found"})
            return
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not (ranges and asked):
            self._say(200, data)
        elif int(asked[1]) >= len(data):
            self._say(416, **{"Content-Range": f"bytes */{len(data)}"})
        else:
            part = data[int(asked[1]) : int(asked[2]) + 1]
            where = f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(data)}"
            self._say(206, part, ETag=f'"{_tag(data)}"', **{"Content-Range": where})

    def _tree(self, folder: str) -> None:
        inside: dict[str, dict] = {}
        for name, data in self.server.hub.files.items():
            if name.startswith(folder):
                child, _, below = name.removeprefix(folder).partition("/")
                entry = {"type": "directory", "size": 0} if below else {"type": "file", "size": len(data)}
                inside[child] = {"path": f"{folder}{child}", "oid": _tag(data), **entry}
        if inside:
            self._json(list(inside.values()))
        else:
            self._say(404, **{"X-Error-Code": "EntryNotFound"})

    def _json(self, value: object) -> None:
        self._say(200, json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _say(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _tag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
