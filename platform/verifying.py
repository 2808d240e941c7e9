"""Verification of the shards (`parts.py` says where they are read), its report and what it comes to."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from copernicus.datasets.index import current_stamp
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.storage import Stamp, read_bytes, stamps, write_bytes
from copernicus.datasets.verify import SCHEMA, Row, duplicates, to_table, verify_shard
from copernicus.platform.parts import Parts, Report

VERSION = 1
"""Of the checks; what an interrupted job of another version left is done anew."""
METADATA = b"copernicus_verify"
_READERS_PER_CPU = 2
NAMED = 3
NAMES, REST = "json", "tar, grid"
"""How the summary calls the members and rows of no sensor."""


@dataclass
class Tally:
    """Of the rows of one sensor: how many have a fault, how many a note, and what values there are as they are stored."""

    members: int = 0
    faulty: int = 0
    noted: int = 0
    measured: int = 0
    finite_sum: float = 0.0
    low: float = math.inf
    high: float = -math.inf

    @property
    def finite(self) -> float | None:
        """Mean share of finite values, of the members whose values could be looked at."""
        return self.finite_sum / self.measured if self.measured else None


@dataclass
class Summary:
    """``root``: folder of all shards, left out where they are named. ``sensors``: of the sensors, `NAMES` and `REST`.
    ``faults``, ``notes``: reason -> how many rows; ``first``: reason -> the first few, as (member, detail)."""

    root: str
    shards: int
    grids: int = 0
    sensors: dict[str, Tally] = field(default_factory=lambda: {name: Tally() for name in (*SENSORS, NAMES, REST)})
    faults: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    def add(self, table: pa.Table) -> None:
        for row in table.to_pylist():
            kind = row["sensor"] or (NAMES if row["member"].endswith(".json") else REST)
            tally = self.sensors[kind]
            tally.members += 1
            tally.faulty += not row["ok"]
            tally.noted += bool(row["notes"])
            if row["finite"] is not None:
                tally.measured += 1
                tally.finite_sum += row["finite"]
            if row["min"] is not None:
                tally.low, tally.high = min(tally.low, row["min"]), max(tally.high, row["max"])
            for said, counts in ((row["faults"], self.faults), (row["notes"], self.notes)):
                for one in said:
                    counts[one["reason"]] += 1
                    named = self.first.setdefault(one["reason"], [])
                    if len(named) < NAMED:
                        named.append((_place(row, self.root), one["detail"]))

    @property
    def faulty(self) -> int:
        """Rows with a fault."""
        return sum(tally.faulty for tally in self.sensors.values())


def verify_shards(shards: Sequence[str], path: str, report: Report) -> Summary:
    """Read everything in these shards (`expand` has listed them) and write the report, a parquet file of the columns
    `SCHEMA`, in the order of the shards; ``path`` is one that `check_place` has looked at.

    Raises:
        OSError: it cannot be written; what was done so far is kept.
    """
    parts = _parts(path)
    parts.make(shards, report)
    summary = Summary(_root(shards), len(shards))
    sink = pa.BufferOutputStream()
    schema = SCHEMA.with_metadata({METADATA: json.dumps({"version": VERSION}).encode()})
    with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
        grids: dict[str, str] = {}
        for table in _with_duplicates(parts, shards, grids):
            summary.add(table)
            writer.write_table(table.replace_schema_metadata(schema.metadata))
    summary.grids = len(grids)
    write_bytes(path, sink.getvalue().to_pybytes())
    parts.remove()
    return summary


def _parts(path: str) -> Parts:
    return Parts(path, verified, _stamp, _problems, _READERS_PER_CPU)


def verified(uri: str) -> pa.Table:
    """The rows of one shard, and its stamp in the schema's metadata: None where something might be read another time."""
    stamp = current_stamp(uri)
    try:
        rows = verify_shard(uri)
    except OSError as error:
        rows = [Row(uri, faults={"unreadable": str(error)})]
    if any("unreadable" in row.faults for row in rows):
        stamp = None
    described = json.dumps({"version": VERSION, "stamp": stamp})
    return to_table(rows).replace_schema_metadata({METADATA: described.encode()})


def _stamp(table: pa.Table, uri: str) -> Stamp | None:
    described = json.loads((table.schema.metadata or {}).get(METADATA, b"{}"))
    known = described.get("version") == VERSION and described["stamp"] is not None
    return Stamp(*described["stamp"]) if known else None


def _problems(table: pa.Table) -> int:
    return table["ok"].to_pylist().count(False)


def _with_duplicates(parts: Parts, shards: Sequence[str], first: dict[str, str]) -> Iterator[pa.Table]:
    """Each shard's rows; behind them one for each grid that an earlier shard had already. ``first`` is filled: grid ->
    the shard it is taken from."""
    for uri in shards:
        table = pq.read_table(parts.path(uri)).replace_schema_metadata()
        again = duplicates((g for g in table["grid"].to_pylist() if g), uri, first)
        yield pa.concat_tables([table, to_table(again)]) if again else table


def check_place(path: str) -> None:
    """Raises InputError where the report cannot lie, or where something else does."""
    if "://" not in path and not Path(path).absolute().parent.is_dir():
        raise InputError(f"--out {path}: no such folder; make it first")
    if "://" not in path and Path(path).is_dir():
        raise InputError(f"--out {path} is a folder; name a file, such as {path.rstrip('/')}/verify.parquet")
    if stamps([path])[0] is None:
        return
    try:
        ours = METADATA in (pq.read_schema(pa.BufferReader(read_bytes(path))).metadata or {})
    except (pa.ArrowException, OSError):
        ours = False
    if not ours:
        raise InputError(f"{path} is there and is no report of `copernicus data verify`; give another --out")


def _root(shards: Sequence[str]) -> str:
    """The folder that all of them lie below, with its slash."""
    folders = zip(*(shard.split("/")[:-1] for shard in shards), strict=False)
    return "".join(f"{same[0]}/" for same in takewhile(lambda names: len(set(names)) == 1, folders))


def _place(row: dict[str, Any], root: str) -> str:
    """Such as ``example-000000.tar:0200599.dem.pth``."""
    within = row["member"] or row["grid"]
    return row["shard"].removeprefix(root) + (f":{within}" if within else "")
