"""Byte ranges of local files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from copernicus.datasets.shards import expand_shards


class Stamp(NamedTuple):
    """By which a file is known again: its size in bytes and its modification time in ns."""

    size: int
    version: str


@dataclass(frozen=True)
class File:
    uri: str

    def stamp(self) -> Stamp:
        found = os.stat(self.uri)
        return Stamp(found.st_size, str(found.st_mtime_ns))

    def read(self, offset: int, length: int) -> bytes:
        with open(self.uri, "rb") as file:
            data = os.pread(file.fileno(), length, offset)
        if len(data) != length:
            raise OSError(f"{len(data)} of {length} bytes at {offset}")
        return data

    def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return [self.read(offset, length) for offset, length in ranges]


def open_file(uri: str) -> File:
    return File(uri)


def expand(spec: str | Sequence[str]) -> list[str]:
    return [os.path.abspath(path) for path in expand_shards(spec)]


def exists(path: str) -> bool:
    return os.path.exists(path)


def read_bytes(path: str) -> bytes:
    return Path(path).read_bytes()


def write_bytes(path: str, data: bytes) -> None:
    """Atomically."""
    part = Path(f"{path}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
