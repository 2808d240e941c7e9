"""How each kind of remote store is asked: open one object, read a range of it, put a small one, list a folder.

Nothing here tries twice; patience, ranges and names are `storage.py`'s. The libraries' own retries are off where that
can be, so that there is one schedule and one bound. What an answer means is told by the exception's kind:
`FileNotFoundError`, `PermissionError` and `Refused` are final, anything else may pass when asked again.

``s3://`` and ``gs://`` go through pyarrow (`store_arrow.py`), ``http(s)://`` and ``hf://`` through requests
(`store_http.py`), all others through fsspec (here). Credentials come from the environment, a profile or the machine's
role, never from a URI; ``s3://anonymous@bucket/...`` sends none.
"""

from __future__ import annotations

import os
import re
from typing import Any, NamedTuple, Protocol

from copernicus.datasets.sensors import InputError

CONNECT_S = 5.0
SILENCE_S = 10.0
"""A request fails after so many seconds without a connection, or then without a byte. (curl, which S3 is read with,
takes up to 6 s more to notice a stop in mid-body. GcsFileSystem has its own: 2 minutes of silence.)"""


class Refused(OSError):
    """The store answered, and asking again will not change the answer."""


class StoreError(OSError):
    """A file could not be read or written, though it may be there."""

    def __init__(self, uri: str, said: str, tries: int = 1):
        super().__init__(f"{shown(uri)}: {said}" + (f" ({tries} tries)" if tries > 1 else ""))
        self.uri, self.said, self.tries = uri, said, tries

    def __reduce__(self) -> tuple[Any, ...]:
        return StoreError, (self.uri, self.said, self.tries)


class Handle(Protocol):
    """An object as it was when opened. ``version``: its ETag, else when it was modified, else empty."""

    size: int
    version: str

    def read(self, offset: int, length: int) -> bytes | bytearray:
        """What the store sent: ``length`` bytes (above 0), or fewer where it stopped short."""
        ...


class Store(Protocol):
    lists: bool  # whether folders can be listed

    def open(self, uri: str) -> Handle: ...
    def put(self, uri: str, data: bytes) -> None: ...
    def list(self, folder: str) -> dict[str, bool]:
        """Name -> is it a folder; empty where there is no such folder."""
        ...


class Place(NamedTuple):
    """What a connection is made for, so that one serves all URIs of a bucket or server."""

    scheme: str
    host: str  # or bucket
    anonymous: bool
    options: tuple[tuple[str, str], ...]
    endpoint: str


_OPTIONS = re.compile(r"\?(?:(?:region|scheme|endpoint_override)=[^&?]+(?:&(?=.)|$))+$")
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
    "gs": ("STORAGE_EMULATOR_HOST",),
    "hf": ("HF_ENDPOINT",),
}


def scheme_of(uri: str) -> str:
    """Empty for a local path or ``file://``."""
    found = re.match(r"([a-z][a-z0-9+.-]+)://", uri)
    return "" if found is None or found[1] == "file" else found[1]


def split_options(uri: str) -> tuple[str, str]:
    """(URI, options): an ``s3://`` URI may end in ``?region=...&scheme=...&endpoint_override=...``, as pyarrow's may."""
    found = _OPTIONS.search(uri) if uri.startswith("s3://") else None
    return (uri[: found.start()], found[0]) if found else (uri, "")


def shown(uri: str) -> str:
    """The URI for messages: a presigned one carries its key in the query."""
    return re.sub(r"\?.*", "?...", uri) if uri.startswith(("http://", "https://")) else uri


def place_of(uri: str) -> Place:
    """
    Raises:
        InputError: the URI carries a user or a password; the message does not.
    """
    scheme, _, rest = uri.partition("://")
    host = rest.partition("/")[0]
    user, at, host = host.rpartition("@")
    bucket = scheme in ("s3", "gs")
    # A bucket's name has no colon, but a secret key may have a slash, and then the @ is further on.
    if (at and not (bucket and user == "anonymous")) or (bucket and ":" in host):
        raise InputError(
            f"{scheme}://***@...: leave user and password out of the URI; they come from the environment or a profile"
        )
    options = split_options(uri)[1].lstrip("?")
    pairs = tuple(tuple(pair.split("=", 1)) for pair in options.split("&") if pair)
    endpoint = next(filter(None, map(os.environ.get, _ENDPOINTS.get(scheme, ()))), "")
    return Place(scheme, host, bool(at), pairs, endpoint)  # type: ignore[arg-type]


def connect(place: Place) -> Store:
    # Each only where it is asked for: none is imported for local files.
    if place.scheme in ("s3", "gs"):
        from copernicus.datasets.store_arrow import ArrowStore

        return ArrowStore(place)
    if place.scheme in ("http", "https"):
        from copernicus.datasets.store_http import HttpStore

        return HttpStore()
    if place.scheme == "hf":
        from copernicus.datasets.store_http import HubStore

        return HubStore(place.endpoint or None)
    return _FsspecStore()


def listed(fs: Any, folder: str) -> dict[str, bool]:
    """What an fsspec file system lists; see `Store.list`."""
    try:
        found = fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, NotImplementedError) as error:
        raise Refused(str(error)) from error
    return {str(f["name"]).rstrip("/").rpartition("/")[2]: f["type"] == "directory" for f in found}


class _FsspecHandle:
    def __init__(self, fs: Any, path: str):
        self._fs, self._path = fs, path
        info = fs.info(path)
        if info["type"] != "file" or info.get("size") is None:
            raise FileNotFoundError("no such file, or one of unknown size")
        self.size = int(info["size"])
        keys = ("ETag", "etag", "generation", "LastModified", "last_modified", "modified", "mtime", "created")
        self.version = str(next((info[k] for k in keys if info.get(k)), "")).strip('"')

    def read(self, offset: int, length: int) -> bytes:
        return self._fs.cat_file(self._path, start=offset, end=offset + length)


class _FsspecStore:
    lists = True

    def _find(self, uri: str) -> tuple[Any, str]:
        from fsspec.core import url_to_fs

        try:
            return url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise Refused(f"no such kind of store here ({error})") from error

    def open(self, uri: str) -> Handle:
        return _FsspecHandle(*self._find(uri))

    def put(self, uri: str, data: bytes) -> None:
        fs, path = self._find(uri)
        fs.pipe_file(path, data)

    def list(self, folder: str) -> dict[str, bool]:
        fs, path = self._find(folder)
        fs.invalidate_cache()
        return listed(fs, path)
