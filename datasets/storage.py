"""Files wherever they lie: byte ranges, whole small files and lists of shards, local or on an object store.

A shard is 5 GB of which a training sample uses a few small ranges. Locally these are `os.pread`s of a file kept open; on
a store, one request for each run of neighbouring ranges, several at a time. Which URIs there are: see `stores.py`.

What may pass (a 5xx, a broken connection, a short body, silence) is asked again after `WAITS`. With the time limits of
`stores.py` a read that never succeeds ends in `StoreError` after 6 s of waiting and at most 6 x 21 s of silence.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from copernicus.datasets import stores
from copernicus.datasets.handles import here, local_handle, open_remote, remote_handle, store_of
from copernicus.datasets.ranges import Request, plan_requests
from copernicus.datasets.sensors import InputError
from copernicus.datasets.stores import StoreError

WAITS = (0.2, 0.4, 0.8, 1.6, 3.2)
"""Seconds between tries, without jitter: a run is the same twice."""

FINAL = (FileNotFoundError, PermissionError, stores.Refused)

T = TypeVar("T")


class Stamp(NamedTuple):
    """Tells whether a file is still the one it was. ``size`` in bytes; ``version``: locally the time of modification in
    ns, on a store the ETag, else the time of modification, else empty."""

    size: int
    version: str


class File:
    """Reads a file. Holds nothing but its name: copy it, pickle it, use it from many threads. Make one by `open_file`.

    Bytes are those that the name stands for at the time of the read. Whoever needs them to be of one version compares
    `stamp` before and after. All methods raise FileNotFoundError, PermissionError (both at once) and StoreError.
    """

    __slots__ = ("_path", "uri")

    def __init__(self, uri: str):
        self.uri = uri
        self._path = None if stores.scheme_of(uri) else uri

    def __reduce__(self) -> tuple[Any, ...]:
        return File, (self.uri,)

    def __repr__(self) -> str:
        return f"File({stores.shown(self.uri)!r})"

    def stamp(self) -> Stamp:
        """Asks the file system or the store anew, each time."""
        if self._path is not None:
            found = os.stat(self._path)
            return Stamp(found.st_size, str(found.st_mtime_ns))
        handle = _patiently(self.uri, lambda: open_remote(self.uri))
        return Stamp(handle.size, handle.version)

    def read(self, offset: int, length: int) -> bytes:
        """Exactly ``length`` bytes. A file that ends before raises StoreError at once."""
        if self._path is None:
            return self.read_ranges([(offset, length)])[0]
        if offset < 0 or length < 0:
            raise ValueError(f"range ({offset}, {length})")
        return local_handle(self._path).read(offset, length)

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, length), in the order given."""
        if any(offset < 0 or length < 0 for offset, length in ranges):
            raise ValueError(f"ranges {ranges}")
        if self._path is not None:
            handle = local_handle(self._path)
            return [handle.read(offset, length) for offset, length in ranges]
        parts = [b""] * len(ranges)
        plan = plan_requests(ranges)
        if len(plan) > 1:
            _patiently(self.uri, lambda: remote_handle(self.uri))  # once, not by each thread
        for request, data in zip(plan, _fetch_all(self.uri, plan), strict=True):
            view = memoryview(data)
            for index in request.ranges:
                start = ranges[index][0] - request.offset
                parts[index] = bytes(view[start : start + ranges[index][1]])
        return parts


def open_file(uri: str | Path) -> File:
    """A file by its local path, ``file://``, or the URI of a store. Touches nothing yet.

    Raises:
        InputError: the URI carries credentials.
    """
    uri = str(uri)
    if stores.scheme_of(uri):
        stores.place_of(uri)
        return File(uri)
    return File(local_path(uri))


def local_path(name: str) -> str:
    """Absolute, for workers may run in another directory; without ``file://``, with ``~`` expanded."""
    return os.path.abspath(os.path.expanduser(re.sub(r"^file://(localhost)?(?=/)", "", name)))


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _patiently(uri: str, ask: Callable[[], T], given_up: threading.Event | None = None) -> T:
    """What ``ask`` returns, asked again after each of WAITS while its exception is one that may pass."""
    for tries, pause in enumerate((*WAITS, None), 1):
        try:
            return ask()
        except InputError:
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{stores.shown(uri)} does not exist") from error
        except PermissionError as error:
            raise PermissionError(f"{stores.shown(uri)}: access denied ({_line(error)})") from error
        except stores.Refused as error:
            raise StoreError(uri, _line(error), tries) from error
        except Exception as error:  # libraries raise many kinds; all of these may pass
            if pause is None or (given_up and given_up.is_set()):
                raise StoreError(uri, _line(error), tries) from error
        _pause(pause)
    raise AssertionError


def _line(error: BaseException) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    said = re.sub(r"://[^/@ ]*@", "://***@", re.sub(r"\?[^ ]*(?i:signature|credential|token)[^ ]*", "?...", said))
    return said.split(" error_info=")[0][:300]


def _fetch(uri: str, request: Request, given_up: threading.Event | None = None) -> bytes | bytearray:
    return _patiently(uri, lambda: _fetch_once(uri, request), given_up)


def _fetch_once(uri: str, request: Request) -> bytes | bytearray:
    kept = here().remote
    handle = kept.find(uri)
    if handle is not None:
        try:
            return _exactly(handle, request)
        except FINAL:
            # The object may have been replaced, or a signed address expired: only a new handle's word is final.
            pass
        except Exception:
            kept.drop(uri, handle)
            raise
    return _exactly(open_remote(uri), request)


def _exactly(handle: stores.Handle, request: Request) -> bytes | bytearray:
    if request.offset + request.length > handle.size:
        raise stores.Refused(f"ends at byte {handle.size}, before {request.offset} + {request.length}")
    data = handle.read(request.offset, request.length)
    if len(data) != request.length:
        raise OSError(f"{len(data)} of {request.length} bytes came")
    return data


def _fetch_all(uri: str, plan: Sequence[Request]) -> list[bytes | bytearray]:
    """REQUESTS at a time; the first to fail ends the patience of the others."""
    if len(plan) < 2:
        return [_fetch(uri, request) for request in plan]
    given_up = threading.Event()
    futures = [here().pool.submit(_fetch, uri, request, given_up) for request in plan]
    try:
        done, _ = wait(futures, return_when=FIRST_EXCEPTION)
        for failed in (f for f in done if f.exception()):
            failed.result()
        return [future.result() for future in futures]
    finally:
        given_up.set()
        for future in futures:
            future.cancel()


def stamps(uris: Sequence[str | Path]) -> list[Stamp | None]:
    """Of many files, None where there is none; those on stores asked for several at a time.

    Raises:
        PermissionError, StoreError: as `File.read`.
    """

    def stamp(file: File) -> Stamp | None:
        try:
            return file.stamp()
        except FileNotFoundError:
            return None

    return list(here().pool.map(stamp, map(open_file, uris)))


def list_folder(uri: str) -> dict[str, bool]:
    """What lies in a folder of a store: name -> is it a folder; empty where there is no such folder.

    Raises:
        PermissionError, StoreError: as `File.read`.
    """
    return _patiently(uri, lambda: store_of(uri).list(uri))


def read_bytes(uri: str | Path) -> bytes:
    """A whole small file, as it is now.

    Raises:
        FileNotFoundError, PermissionError, StoreError: as `File.read`.
    """
    file = open_file(uri)
    if not stores.scheme_of(file.uri):
        return Path(file.uri).read_bytes()
    return file.read(0, file.stamp().size)


def write_bytes(uri: str | Path, data: bytes) -> None:
    """A whole small file. Under its name there is what was there before or all of ``data``, never a part.

    Raises:
        OSError: it cannot be written.
    """
    file = open_file(uri)
    if stores.scheme_of(file.uri):
        _patiently(file.uri, lambda: store_of(file.uri).put(file.uri, data))
        return
    path = Path(file.uri)
    part = path.with_name(f".{path.name}.part-{os.getpid()}-{threading.get_ident()}")
    try:
        with open(part, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
