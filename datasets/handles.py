"""What a process keeps open: local files, remote objects, connections, and the threads that ask stores."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from copernicus.datasets import stores
from copernicus.datasets.stores import StoreError

REQUESTS = 8  # at a time, in a process
LOCAL_HANDLES = 256  # open files a process keeps
REMOTE_HANDLES = 8192  # these cost no file descriptor, and opening one again costs a request


class LocalHandle:
    """Closed when the last thread that reads with it lets go, so that no number is closed, and given to another file,
    under a reader."""

    def __init__(self, path: str):
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        found = os.fstat(self.fd)
        self.identity = (found.st_dev, found.st_ino)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)

    def read(self, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self.fd, length, offset)
        except OSError as error:
            raise StoreError(self.path, error.strerror or str(error)) from error
        return data if len(data) == length else self._rest(data, offset, length)

    def _rest(self, data: bytes, offset: int, length: int) -> bytes:
        parts = [data]
        while length > (have := sum(map(len, parts))):  # a read above 2 GB comes in parts
            parts.append(os.pread(self.fd, length - have, offset + have))
            if not parts[-1]:
                raise StoreError(self.path, f"ends at byte {os.fstat(self.fd).st_size}, before {offset} + {length}")
        return b"".join(parts)


class _Recent(OrderedDict[str, Any]):
    """The most recently used, up to a number."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most
        self.lock = threading.Lock()

    def find(self, key: str) -> Any:
        with self.lock:
            value = self.get(key)
            if value is not None:
                self.move_to_end(key)
            return value

    def keep(self, key: str, value: Any) -> None:
        with self.lock:
            self[key] = value
            self.move_to_end(key)
            out = self.popitem(last=False) if len(self) > self.most else None
        del out  # closed outside of the lock

    def drop(self, key: str, value: Any) -> None:
        """Unless it was replaced by another meanwhile."""
        with self.lock:
            if self.get(key) is value:
                del self[key]


class _Process:
    """Handles, connections and threads of one process. A forked child makes its own: of its parent's, threads and locks
    are in no usable state. It keeps the parent's objects alive, for closing them could wait for those threads."""

    def __init__(self, parent: _Process | None):
        self.pid = os.getpid()
        self.parent = parent
        self.local = _Recent(LOCAL_HANDLES)
        self.remote = _Recent(REMOTE_HANDLES)
        self.stores: dict[stores.Place, stores.Store] = {}
        self.pool = ThreadPoolExecutor(REQUESTS, thread_name_prefix="storage")


_process: _Process | None = None


def here() -> _Process:
    global _process
    if _process is None or _process.pid != os.getpid():
        _process = _Process(_process)
    return _process


def local_handle(path: str) -> LocalHandle:
    """A file replaced under its name is another inode (a number cannot be used again while we hold the old file open); a
    file written in place is the same one, and reads give its new bytes."""
    found = os.stat(path)
    kept = here().local
    handle = kept.find(path)
    if handle is None or handle.identity != (found.st_dev, found.st_ino):
        handle = LocalHandle(path)
        kept.keep(path, handle)
    return handle


def store_of(uri: str) -> stores.Store:
    known = here().stores
    place = stores.place_of(uri)
    if place not in known:
        known[place] = stores.connect(place)
    return known[place]


def remote_handle(uri: str) -> stores.Handle:
    """One kept open, else a new one."""
    return here().remote.find(uri) or open_remote(uri)


def open_remote(uri: str) -> stores.Handle:
    handle = store_of(uri).open(uri)
    here().remote.keep(uri, handle)
    return handle
