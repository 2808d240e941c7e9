"""Who uses an entry of the feature cache, who writes one, and which go when there is no room: by locks that die with
their processes.

Locks are flock's: on a network file system of Linux they hold between nodes; where there are none at all, nothing in use
is protected but what was used in the last ``GRACE_S`` seconds.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

CONTENT, PARTIAL = "content.json", "partial"
GRACE_S = 60.0
LEFTOVERS_S = 24 * 3600.0
"""What a dead writer left is kept so long, for another to go on from."""

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}


class Lease:
    """A shared lock on a file as long as this object lives: whoever would evict its entry sees it.

    Raises:
        FileNotFoundError: the file is not there, or was being taken away.
    """

    def __init__(self, path: Path) -> None:
        self._fd = -1
        self._fd = os.open(path, os.O_RDONLY)
        with _lockless():
            fcntl.flock(self._fd, fcntl.LOCK_SH)
        if not _same(self._fd, path):
            raise FileNotFoundError(path)

    def touch(self) -> None:
        """Note that it was used now; in a folder that one may only read there is nothing to note."""
        with contextlib.suppress(OSError):
            os.utime(self._fd)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)


@contextlib.contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[bool | None]:
    """Hold a lock file, which is made and taken away. Yields True; False where another holds it (``wait=False``); None
    where the file system knows no locks."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        held = True
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if wait:
                    logger.info("waiting for another process that writes %s", path.name.removesuffix(".lock"))
                    fcntl.flock(fd, fcntl.LOCK_EX)
                else:
                    held = False
        except OSError as error:
            os.close(fd)
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            yield None
            return
        except BaseException:
            os.close(fd)
            raise
        if not held or _same(fd, path):
            break
        os.close(fd)  # its holder took it away when it was done: the one there now is another file
    try:
        yield held
    finally:
        if held:
            path.unlink(missing_ok=True)
        os.close(fd)


@dataclass(frozen=True)
class Kept:
    """A folder in the cache: an entry, or what a writer works at or left."""

    path: Path
    bytes: int
    used: float  # seconds since 1970

    @property
    def partial(self) -> bool:
        return self.path.name.startswith(".")


OURS = re.compile(r"\.?(train|val|test)-[0-9a-f]{24}(\.[0-9a-f]{32})?(\.(partial|gone))?")
"""Names of entries and of what dead writers leave: the cache's folder may hold other things, which are nobody's to remove."""


def contents(cache: Path) -> list[Kept]:
    """All entries and leftovers, the least recently used first."""
    found = []
    for folder in cache.glob("*/*"):
        with contextlib.suppress(OSError):  # another process takes it away
            if OURS.fullmatch(folder.name) and folder.is_dir():
                status = [path.stat() for path in folder.iterdir()]
                content = [(folder / CONTENT).stat()] if (folder / CONTENT).exists() else status
                # Files are made as long as they will be: blocks, not sizes.
                size = sum(s.st_blocks * 512 for s in status)
                used = max((s.st_mtime for s in content), default=folder.stat().st_mtime)
                found.append(Kept(folder, size, used))
    return sorted(found, key=lambda kept: kept.used)


def evict(cache: Path, limit_bytes: float) -> list[Path]:
    """Remove what dead writers left longer ago than a day and, the least recently used first, what exceeds a limit.

    Entries in use and those of the last ``GRACE_S`` seconds stay, and with them what is being written.

    Returns:
        the folders removed.
    """
    kept, removed = contents(cache), []
    total, now = sum(one.bytes for one in kept), time.time()
    for one in kept:
        age = now - one.used
        over = total > limit_bytes
        if age < GRACE_S or not (over or (one.partial and age > LEFTOVERS_S)):
            continue
        if _leftover(one.path, age) if one.partial else _unused(one.path):
            total -= one.bytes
            removed.append(one.path)
            logger.info(
                "feature cache: removed %s (%.2f GB, last used %.0f min ago)", one.path, one.bytes / 1e9, age / 60
            )
    if total > limit_bytes:
        logger.warning(
            "feature cache %s holds %.2f GB, more than its limit of %.2f GB: all of it is in use",
            cache,
            total / 1e9,
            limit_bytes / 1e9,
        )
    return removed


def remove(folder: Path) -> None:
    """Take an entry away at once, then its files. Who has them mapped goes on reading them."""
    gone = folder.with_name(f".{folder.name.lstrip('.')}.{uuid.uuid4().hex}.gone")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _unused(entry: Path) -> bool:
    """Take an entry away, unless somebody has it open."""
    try:
        fd = os.open(entry / CONTENT, os.O_RDWR)
    except FileNotFoundError:
        shutil.rmtree(entry, ignore_errors=True)
        return True
    except OSError:
        return False
    try:
        with _lockless():
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Whoever waits for a lease on this very file then finds that it has gone.
        remove(entry)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)


def _leftover(folder: Path, age: float) -> bool:
    """Take away what a dead writer left: who lives holds its lock or, where there are none, wrote within a day."""
    name = folder.name.removesuffix(f".{PARTIAL}")
    with exclusive(folder.with_name(f"{name}.lock"), wait=False) as held:
        dead = age > LEFTOVERS_S if held is None else held
        if dead:
            shutil.rmtree(folder, ignore_errors=True)
        return dead


@contextlib.contextmanager
def _lockless() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _same(fd: int, path: Path) -> bool:
    """Whether the path still is this open file."""
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
