"""What a process and all its descendants have used, from Linux's /proc: processor, bytes read, memory."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Usage:
    """Since the start of the tree. cpu_s: user and system. read_bytes: by read calls, from the page cache or not."""

    at: float
    cpu_s: float
    read_bytes: int

    def since(self, earlier: Usage) -> Usage:
        return Usage(self.at - earlier.at, self.cpu_s - earlier.cpu_s, self.read_bytes - earlier.read_bytes)


def tree(root: int) -> list[int]:
    """The process and its living descendants."""
    children: dict[int, list[int]] = {}
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        if (stat := _stat(pid)) is not None:
            children.setdefault(int(stat[1]), []).append(pid)
    found, queue = [], [root]
    while queue:
        found.append(queue.pop())
        queue += children.get(found[-1], [])
    return found


def usage(root: int) -> Usage:
    ticks = os.sysconf("SC_CLK_TCK")
    cpu_s, read = 0.0, 0
    for pid in tree(root):
        if (stat := _stat(pid)) is not None:
            # Fields 14-17: own user and system time, and that of children waited for.
            cpu_s += sum(int(field) for field in stat[11:15]) / ticks
        for line in _lines(Path(f"/proc/{pid}/io")):
            if line.startswith("rchar:"):
                read += int(line.split()[1])
    return Usage(time.perf_counter(), cpu_s, read)


def memory_bytes(root: int) -> int:
    """Memory of the tree, shared pages counted once: proportional set sizes, and shared memory that is only held by an
    open file (a tensor on its way between processes)."""
    total = 0
    mapped: set[int] = set()
    held: dict[int, int] = {}
    for pid in tree(root):
        for line in _lines(Path(f"/proc/{pid}/smaps_rollup")):
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
        mapped |= {int(line.split()[4]) for line in _lines(Path(f"/proc/{pid}/maps")) if "/dev/shm/" in line}
        held |= dict(_open_shared_memory(pid))
    return total + sum(size for inode, size in held.items() if inode not in mapped)


class Peak:
    """The largest memory of a tree of processes while the block runs, looked at four times a second."""

    def __init__(self, root: int):
        self.bytes = 0
        self._root, self._stop = root, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(0.25):
            self.bytes = max(self.bytes, memory_bytes(self._root))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def available_bytes() -> int:
    """Memory that the machine can still give."""
    for line in _lines(Path("/proc/meminfo")):
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo does not say what is available")


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat after the name; None once the process is gone."""
    lines = _lines(Path(f"/proc/{pid}/stat"))
    return lines[0].rpartition(")")[2].split() if lines else None


def _open_shared_memory(pid: int) -> Iterator[tuple[int, int]]:
    """(inode, bytes) of its open files in /dev/shm."""
    try:
        for link in os.scandir(f"/proc/{pid}/fd"):
            try:
                if os.readlink(link.path).startswith("/dev/shm/"):
                    stat = os.stat(link.path)
                    yield stat.st_ino, stat.st_blocks * 512
            except OSError:
                continue  # closed in between
    except OSError:
        return  # the process ended


def _lines(path: Path) -> list[str]:
    """Of a file in /proc; none once its process is gone."""
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return []
