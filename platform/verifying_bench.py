"""Verification of a benchmark's folder as a Ray Data job, its report and what it comes to."""

from __future__ import annotations

import io
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from copernicus.datasets.bench.task import Entry
from copernicus.datasets.bench.tasks import get_task
from copernicus.datasets.bench.verify import Row, compare, from_table, list_split, to_table, verify_samples
from copernicus.datasets.storage import write_bytes
from copernicus.platform.verifying import METADATA, NAMED, VERSION

CHUNK = 256
"""Samples that a Ray task reads: seconds of work."""

Report = Callable[[float, float, str], None]
"""Called with samples done, samples in all, and a note."""


@dataclass
class SplitTally:
    """Of one split: how many samples it lists, and how many of them have a fault or a note; what values are stored."""

    listed: int = 0
    faulty: int = 0
    noted: int = 0
    finite: list[float] = field(default_factory=list)
    low: float = math.inf
    high: float = -math.inf


@dataclass
class BenchSummary:
    """``splits``: (task, split) -> tally; ``faults``, ``notes``: reason -> how many rows; ``first``: reason -> the first few,
    as (sample, detail); ``faulty``: rows with a fault."""

    splits: dict[tuple[str, str], SplitTally] = field(default_factory=dict)
    faults: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    faulty: int = 0

    def add(self, row: Row) -> None:
        tally = self.splits.setdefault((row.task, row.split), SplitTally())
        self.faulty += bool(row.faults)
        if row.sample:
            tally.listed += 1
            tally.faulty += bool(row.faults)
            tally.noted += bool(row.notes)
        if row.finite is not None:
            tally.finite.append(row.finite)
        if row.low is not None and row.high is not None:
            tally.low, tally.high = min(tally.low, row.low), max(tally.high, row.high)
        for said, counts in ((row.faults, self.faults), (row.notes, self.notes)):
            for reason, detail in said.items():
                counts[reason] += 1
                named = self.first.setdefault(reason, [])
                if len(named) < NAMED:
                    named.append((f"{row.task} {row.split} {row.sample}".rstrip(), detail))


@dataclass(frozen=True)
class _Work:
    task: str
    folder: Path
    split: str
    entries: tuple[Entry, ...]


def verify_bench(found: Sequence[tuple[str, Path]], path: str, report: Report) -> BenchSummary:
    """Read every sample of these tasks and write the report, a parquet file of the columns `SCHEMA`: task by task, split by
    split, first the split's row, then its samples' in the order of the split file. It starts from the beginning each time.

    Args:
        found: (task, folder), as `find_tasks` finds them.

    Raises:
        OSError: it cannot be written.
    """
    splits: list[tuple[Row, list[int]]] = []
    work: list[_Work] = []
    for name, folder in found:
        for split in get_task(name).splits:
            row, entries = list_split(name, folder, split)
            chunks = [entries[i : i + CHUNK] for i in range(0, len(entries), CHUNK)]
            splits.append((row, list(range(len(work), len(work) + len(chunks)))))
            work += [_Work(name, folder, split, tuple(chunk)) for chunk in chunks]
    done = _read(work, report)
    rows: list[Row] = []
    for row, chunk_numbers in splits:
        rows += [row, *itertools.chain.from_iterable(done[number] for number in chunk_numbers)]
    compare(rows)
    summary = BenchSummary()
    for row in rows:
        summary.add(row)
    described = {METADATA: json.dumps({"version": VERSION}).encode()}
    write_bytes(path, _parquet(to_table(rows).replace_schema_metadata(described)))
    return summary


def _read(work: Sequence[_Work], report: Report) -> dict[int, list[Row]]:
    """The rows of each piece of work, by its number."""
    import ray

    from copernicus.platform.stream import quiet_context

    total, samples, faulty = sum(len(w.entries) for w in work), 0, 0
    report(0, total, "")
    done: dict[int, list[Row]] = {}
    if not work:
        return done
    quiet_context()
    items = [{"number": number, "work": w} for number, w in enumerate(work)]
    dataset = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        _verify, batch_size=None, num_cpus=1
    )
    for result in dataset.iter_rows():
        rows = from_table(pq.read_table(io.BytesIO(result["part"])))
        done[int(result["number"])] = rows
        samples += len(rows)
        faulty += sum(bool(row.faults) for row in rows)
        report(samples, total, f"{faulty} with faults" if faulty else "")
    return done


def _verify(batch: dict[str, Any]) -> dict[str, Any]:
    parts = []
    for work in batch["work"]:
        rows = verify_samples(work.task, work.folder, work.split, work.entries)
        assert len(rows) == len(work.entries), (work.task, work.split)
        parts.append(_parquet(to_table(rows)))
    return {"number": np.asarray(batch["number"]), "part": parts}


def _parquet(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()
