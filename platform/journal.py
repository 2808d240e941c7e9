"""Finished trials of a sweep, on disk before anything else hears of them: what a resumed sweep does not do again."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SEARCH, FINAL = "search", "final"
FINISHED, STOPPED, FAILED = "finished", "stopped", "failed"


@dataclass(frozen=True)
class Trial:
    """One trial of a cell: of the search (validation only), or of the final estimate (the test split, once).

    Attributes:
        cell: the cell's key.
        number: counted from 0 in a search; the seed in the final estimate.
        metrics: ``val/...``, ``test/...``, ``samples/...``, ``seconds``; empty for a failed trial.
        curve: figures by epoch.
        status: finished, stopped (by the scheduler, before its last epoch) or failed.
        error: why it failed.
    """

    cell: str
    role: str
    number: int
    settings: dict[str, float]
    metrics: dict[str, float] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    status: str = FINISHED
    error: str = ""

    @property
    def key(self) -> str:
        return f"{self.cell}-{self.role}-{self.number}"


class Journal:
    """Trials by key, appended to a file as they finish. A trial that comes again under its key replaces the earlier."""

    def __init__(self, path: Path):
        self.path = path
        self.trials: dict[str, Trial] = {}
        if path.exists():
            for line in path.read_text(errors="replace").splitlines():
                try:
                    trial = Trial(**json.loads(line))
                except (json.JSONDecodeError, TypeError):  # the line a kill cut off: its trial is not finished
                    continue
                self.trials[trial.key] = trial

    def add(self, trial: Trial) -> None:
        with open(self.path, "ab+") as file:
            torn = False  # by a kill: what it left is a line of its own
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                torn = file.read() != b"\n"
            file.write(("\n" * torn + json.dumps(dataclasses.asdict(trial)) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.trials[trial.key] = trial

    def of(self, cell: str, role: str) -> list[Trial]:
        """The cell's trials of that role, by number."""
        found = [t for t in self.trials.values() if t.cell == cell and t.role == role]
        return sorted(found, key=lambda t: t.number)


def best_trial(trials: list[Trial], metric: str, higher_is_better: bool) -> Trial | None:
    """The best by validation. Of those that ran to their last epoch, if there are any: a trial that a scheduler stopped
    was judged under another schedule than the one its setting would get. Of equals the first."""
    known = [t for t in trials if t.status != FAILED and math.isfinite(t.metrics[f"val/{metric}"])]
    done = [t for t in known if t.status == FINISHED] or known
    sign = 1 if higher_is_better else -1
    return max(done, key=lambda t: (sign * t.metrics[f"val/{metric}"], -t.number), default=None)


def as_numbers(values: dict[str, Any], prefixes: tuple[str, ...]) -> dict[str, float]:
    return {k: float(v) for k, v in values.items() if k.startswith(prefixes)}
