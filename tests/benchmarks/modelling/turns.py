"""Variants in processes of their own, which answer one command at a time, and what they are asked for."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from modelling.work import BASE, QUICK, Shape


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is run: batches to encode and to train on, turns of each variant and calls in a turn."""

    device: str
    shape: Shape
    encode_batches: tuple[int, ...]
    step_batches: tuple[int, ...]
    turns: int
    calls: int


PLANS = {
    ("cpu", False): Plan("cpu", BASE, (8, 1), (2, 4), 5, 1),
    ("cpu", True): Plan("cpu", QUICK, (2, 1), (1,), 1, 1),
    ("cuda", False): Plan("cuda", BASE, (64, 1), (64,), 4, 8),
    ("cuda", True): Plan("cuda", QUICK, (2, 1), (2,), 1, 1),
}


class Variant:
    """A variant's process (modelling/child.py)."""

    def __init__(self, name: str, plan: Plan) -> None:
        self.name = name
        here = str(Path(__file__).parents[1])
        path = os.pathsep.join(p for p in (here, os.environ.get("PYTHONPATH", "")) if p)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "modelling.child", name, plan.device, json.dumps(dataclasses.asdict(plan.shape))],
            env=os.environ | {"PYTHONPATH": path}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def send(self, do: str, **arguments: Any) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # said by whoever waits for the answer
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Raises RuntimeError where the process has died; its own words are on stderr."""
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"the process of {self.name!r} ended: see above")
        return json.loads(line)

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.send(do, **arguments)
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@contextlib.contextmanager
def started(names: Sequence[str], plan: Plan, part: str) -> Iterator[list[Variant]]:
    """The variants' processes, their models built, ended on leaving."""
    variants = [Variant(name, plan) for name in names]
    try:
        for variant in variants:
            variant.send("prepare", part=part)
        machines = {variant.answer()["machine"] for variant in variants}
        print(f"{part}: {'; '.join(machines)}", "(--quick: no measurement)" if plan.shape == QUICK else "", flush=True)
        yield variants
    finally:
        for variant in variants:
            variant.close()
