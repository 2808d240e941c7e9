"""One variant in a process of its own: python -m modelling.child VARIANT DEVICE SHAPE.

Reads commands, a JSON object a line, and answers each with one. It waits between them, so that the variants can take
turns while each has its memory for itself.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from modelling.kinds import seconds_by_kind
from modelling.sides import make_side
from modelling.work import CASES, Batch, Shape, encoder_input


class Clock:
    """Seconds between marks: on a GPU by events on its own line, so that nothing waits while the clock runs."""

    def __init__(self, cuda: bool) -> None:
        self.cuda = cuda
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        at: Any = time.perf_counter()
        if self.cuda:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        self.marks.append((name, at))

    def read(self) -> dict[str, list[float]]:
        """Mark -> seconds since the one before it, for each time it was made. Starts anew."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds: dict[str, list[float]] = {}
        for (_, before), (name, at) in zip(self.marks, self.marks[1:], strict=False):
            passed = before.elapsed_time(at) / 1000 if self.cuda else at - before
            seconds.setdefault(name, []).append(passed)
        self.marks = []
        return seconds


def peak_bytes(cuda: bool) -> int:
    """The most memory so far: what the device's allocator gave out, or what the process had resident.

    Not ``ru_maxrss``, which a process inherits from the one that started it.
    """
    if cuda:
        return torch.cuda.max_memory_allocated()
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Child:
    def __init__(self, variant: str, device: str, shape: Shape) -> None:
        self.device, self.shape, self.cuda = device, shape, device == "cuda"
        self.clock = Clock(self.cuda)
        self.side = make_side(variant, shape, device, self.clock.mark)
        self.warm: set[str] = set()
        self.warm_up_calls = 3 if self.cuda else 1
        self.first_losses: dict[str, torch.Tensor] = {}
        self.batch = functools.cache(lambda batch: Batch.make(batch, device))

    def prepare(self, part: str) -> dict[str, Any]:
        """Builds the model; says what it runs on."""
        self.side.prepare(part)
        name = torch.cuda.get_device_name() if self.cuda else f"CPU, {torch.get_num_threads()} threads"
        return {"machine": f"{name}, torch {torch.__version__}"}

    def encode(self, case: str, batch: int, calls: int) -> dict[str, Any]:
        """Seconds of each call."""
        x_BCHW, metadata_B4 = encoder_input(CASES[case], batch, self.device)
        if (key := f"{case} {batch}") not in self.warm:
            self.warm.add(key)
            for _ in range(self.warm_up_calls):
                self.side.encode(x_BCHW, metadata_B4, CASES[case])
        self.clock.mark("start")
        for _ in range(calls):
            self.side.encode(x_BCHW, metadata_B4, CASES[case])
            self.clock.mark("call")
        return {"seconds": self.clock.read()["call"]}

    def step(self, batch: int, calls: int) -> dict[str, Any]:
        """Seconds of each step's parts; the losses of this process's first step, and the peak of its memory."""
        inputs = self.batch(batch)
        if (key := f"step {batch}") not in self.warm:
            self.warm.add(key)
            for _ in range(self.warm_up_calls):
                losses = self.side.step(inputs)
                self.first_losses = self.first_losses or losses
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
        self.clock.read()
        self.clock.mark("start")
        for _ in range(calls):
            self.side.step(inputs)
        parts = self.clock.read()
        first = {name: float(value.detach()) for name, value in self.first_losses.items()}
        return {"parts": parts, "losses": first, "peak_bytes": peak_bytes(self.cuda)}

    def profile(self, batch: int) -> dict[str, Any]:
        """Seconds of one step by kind of operator or kernel."""
        inputs = self.batch(batch)
        self.side.step(inputs)
        seconds = seconds_by_kind(lambda: self.side.step(inputs), self.cuda)
        self.clock.read()
        return {"seconds": dict(seconds)}

    def products(self, shapes: list[list[int]], dtype: str, calls: int) -> dict[str, Any]:
        """Best seconds of one matrix product of each (rows, inner, columns)."""
        best = []
        for rows, inner, columns in shapes:
            a = torch.randn(rows, inner, device=self.device).to(getattr(torch, dtype))
            b = torch.randn(inner, columns, device=self.device).to(getattr(torch, dtype))
            torch.mm(a, b)
            self.clock.mark("start")
            for _ in range(calls):
                torch.mm(a, b)
                self.clock.mark("product")
            best.append(min(self.clock.read()["product"]))
        return {"seconds": best}


def main(variant: str, device: str, shape: str) -> None:
    # Whatever a library prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    child = Child(variant, device, Shape(**json.loads(shape)))
    for line in sys.stdin:
        command = json.loads(line)
        answer = getattr(child, command.pop("do"))(**command)
        if device == "cuda":
            torch.cuda.empty_cache()  # the next variant's turn
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
