"""The physical floor of reading: what memory, the page cache and the disk give for a draw's bytes, one thread."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from reading.made import Layout, draw_ranges


@dataclass(frozen=True)
class Floor:
    """Rates; samples a second of a draw's bytes, or bytes a second."""

    copied: float  # samples/s from memory to memory
    cached: float  # samples/s by pread, shards in the page cache
    cold_slices: float  # samples/s by pread of the same slices, shards not in the page cache
    cold_sequential: float  # bytes/s of a shard from front to back, not in the page cache


def evict(shards: Sequence[str]) -> None:
    """Takes the shards out of the page cache (what the disk's own host keeps of them is out of reach)."""
    for shard in shards:
        with open(shard, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(shards: Sequence[str]) -> float:
    """Bytes/s of reading the shards from front to back; afterwards they are in the page cache."""
    buffer = memoryview(bytearray(8 << 20))
    started, total = time.perf_counter(), 0
    for shard in shards:
        with open(shard, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
    return total / (time.perf_counter() - started)


def measure(layout: Layout, shards: Sequence[str], seconds: float) -> Floor:
    draws = draw_ranges(layout, shards, np.random.default_rng(0))
    evict(shards)
    cold_sequential = warm(shards)
    cached = _read(draws, seconds)
    evict(shards)
    cold_slices = _read(draws, 0)
    return Floor(_copy(layout.sample_bytes, seconds), cached, cold_slices, cold_sequential)


def _copy(size: int, seconds: float) -> float:
    sources = np.ones((16, size), np.uint8)  # more than a processor's caches hold
    target = np.empty(size, np.uint8)
    np.copyto(target, sources[0])
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        np.copyto(target, sources[count % len(sources)])
        count += 1
    return count / (time.perf_counter() - started)


def _read(draws: list[tuple[str, list[tuple[int, int]]]], seconds: float) -> float:
    """Samples/s, in whole passes over the draws; at least one."""
    files = {shard: os.open(shard, os.O_RDONLY) for shard, _ in draws}
    buffer = memoryview(bytearray(max(size for _, ranges in draws for _, size in ranges)))
    try:
        started, count = time.perf_counter(), 0
        while count == 0 or time.perf_counter() - started < seconds:
            for shard, ranges in draws:
                for offset, size in ranges:
                    assert os.preadv(files[shard], [buffer[:size]], offset) == size
                count += 1
        return count / (time.perf_counter() - started)
    finally:
        for file in files.values():
            os.close(file)
