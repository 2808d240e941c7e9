"""HTTP servers and the Hugging Face hub through requests."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import unquote, urlsplit

import requests

from copernicus.datasets.stores import CONNECT_S, SILENCE_S, Handle, Refused, listed


class _HttpHandle:
    """Opened by asking for the first byte: that tells the size, shows that ranges are served, and works where only GET
    is signed. Redirects are followed once, not once a range: the hub's rate limit counts them (3000 in 5 minutes)."""

    def __init__(self, session: Any, url: str, headers: dict[str, str]):
        self._session, self._url, self._headers = session, url, headers
        self.size = 0
        answer, _ = self._ask(0, 1)
        answers = [*answer.history, answer]
        tags = [a.headers.get("X-Linked-ETag") for a in answers] + [answer.headers.get("ETag")]
        version = next(filter(None, tags), None) or answer.headers.get("Last-Modified", "")
        self.version = version.removeprefix("W/").strip('"')
        self.size = _total(answer)
        if urlsplit(answer.url).netloc != urlsplit(url).netloc:
            self._headers = {}  # the token is the first server's
        self._url = answer.url

    def read(self, offset: int, length: int) -> bytes:
        answer, data = self._ask(offset, length)
        if _total(answer) != self.size:
            raise OSError("the file changed while it was open")
        return data

    def _ask(self, offset: int, length: int) -> tuple[Any, bytes]:
        wanted = {"Range": f"bytes={offset}-{offset + length - 1}", "Accept-Encoding": "identity"}
        try:
            with self._session.get(
                self._url, headers={**self._headers, **wanted}, stream=True, timeout=(CONNECT_S, SILENCE_S)
            ) as answer:
                _check(answer, offset)
                return answer, b"".join(answer.iter_content(1 << 20))
        except (requests.exceptions.TooManyRedirects, ValueError) as error:  # ValueError: not a URL
            raise Refused(str(error)) from error


def _check(answer: Any, offset: int) -> None:
    status, where = answer.status_code, answer.headers.get("Content-Range", "")
    said = " ".join(filter(None, (f"HTTP status {status}", answer.reason, answer.headers.get("X-Error-Message"))))
    if status == 416 and offset == 0:
        return  # an empty file
    if status == 200:
        raise Refused("the server serves no byte ranges, only whole files")
    if status == 206 and not where.startswith(f"bytes {offset}-"):
        raise Refused(f"{said}, but Content-Range {where!r}")
    if status != 206:
        raise _meaning(status)(said)


def _meaning(status: int) -> type[OSError]:
    if status in (404, 410):
        return FileNotFoundError
    if status in (401, 403):
        return PermissionError
    return ConnectionError if status in (408, 429) or status >= 500 else Refused


def _total(answer: Any) -> int:
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdigit() else 0


class HttpStore:
    lists = False

    def __init__(self) -> None:
        self._session = requests.Session()
        adapter = requests.adapters.HTTPAdapter(pool_maxsize=8, max_retries=0)
        self._session.mount("http://", adapter)
        self._session.mount("https://", adapter)

    def open(self, uri: str) -> Handle:
        return _HttpHandle(self._session, uri, {})

    def put(self, uri: str, data: bytes) -> None:
        raise Refused("cannot be written to")

    def list(self, folder: str) -> dict[str, bool]:
        raise Refused("an HTTP server lists no folders; name the files, or use braces")


_HUB = re.compile(r"hf://(?:(datasets|spaces)/)?([^/@]+/[^/@]+)(?:@((?:refs/(?:convert|pr)/)?[^/]+))?/(.+)")


class HubStore(HttpStore):
    lists = True

    def __init__(self, endpoint: str | None):
        super().__init__()
        self._endpoint = endpoint

    def open(self, uri: str) -> Handle:
        from huggingface_hub import get_token, hf_hub_url

        parts = _HUB.fullmatch(uri)
        if parts is None:
            raise Refused("not of the form hf://[datasets/ or spaces/]<owner>/<name>[@<revision>]/<path>")
        kind, repository, revision, path = parts.groups()
        url = hf_hub_url(
            repository,
            path,
            repo_type=kind and kind[:-1],
            revision=revision and unquote(revision),
            endpoint=self._endpoint,
        )
        token = get_token()
        return _HttpHandle(self._session, url, {"Authorization": f"Bearer {token}"} if token else {})

    def list(self, folder: str) -> dict[str, bool]:
        from huggingface_hub import HfFileSystem
        from huggingface_hub.errors import HfHubHTTPError

        hub = HfFileSystem(endpoint=self._endpoint, skip_instance_cache=True)
        try:
            return listed(hub, folder)
        except HfHubHTTPError as error:
            raise _meaning(error.response.status_code if error.response is not None else 500)(str(error)) from error
