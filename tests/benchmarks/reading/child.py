"""One measurement in a process of its own: python -m reading.child SIDE WORK SECONDS, the result as JSON on stdout."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from dataclasses import asdict, dataclass

from reading.measure import usage
from reading.work import Side, Work


@dataclass(frozen=True)
class Result:
    """Seconds to index, and from there to the first delivery; then a steady window. peak_bytes is seen from outside."""

    index_s: float
    first_s: float
    samples: int
    wall_s: float
    cpu_s: float
    read_bytes: int
    peak_bytes: int = 0

    @property
    def start_s(self) -> float:
        return self.index_s + self.first_s

    @property
    def rate(self) -> float:
        return self.samples / self.wall_s

    @property
    def per_core(self) -> float:
        """Samples per second of processor time, of all processes."""
        return self.samples / self.cpu_s

    @property
    def bytes_per_sample(self) -> float:
        return self.read_bytes / self.samples


def run(side: Side, work: Work, seconds: float) -> Result:
    side.prepare(work)
    me = os.getpid()
    before = usage(me)
    started = time.perf_counter()
    index = side.index(work)
    indexed = time.perf_counter()
    stream = iter(side.stream(work, index))
    samples = next(stream)
    first = time.perf_counter()
    if not work.once:
        # Whatever was read ahead while the first batch was on its way is not to count.
        while time.perf_counter() - first < seconds / 4:
            next(stream)
        before, samples = usage(me), 0
    began = time.perf_counter()
    for count in stream:
        samples += count
        if not work.once and time.perf_counter() - began >= seconds:
            break
    window = usage(me).since(before)
    return Result(indexed - started, first - indexed, samples, window.at, window.cpu_s, window.read_bytes)


if __name__ == "__main__":
    # Libraries print to stdout; the result is its last line.
    name, work, seconds = sys.argv[1:]
    result = run(importlib.import_module(f"reading.{name}"), Work(**json.loads(work)), float(seconds))
    print(json.dumps(asdict(result)), flush=True)
