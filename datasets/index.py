"""The index of a set of shards: one row a grid, as a parquet file next to the shards or wherever told.

Columns: ``shard`` (relative to the index where it lies below its folder), ``grid`` (the members' key), ``lon``, ``lat``
(degrees), ``missing`` (sensors that cannot be used), ``problems`` (member, reason, detail), and for each sensor a struct
(see `survey.SensorAt`) or null. The schema's metadata keep each shard's size and modification stamp, so that an index
is never used for shards that have changed, and what is wrong with a shard as a whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from copernicus.datasets.expand import expand
from copernicus.datasets.order import uniform
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import Problem
from copernicus.datasets.storage import Stamp, open_file, read_bytes, write_bytes
from copernicus.datasets.stores import split_options
from copernicus.datasets.survey import SensorAt, ShardSurvey, survey_shard

FILE_NAME = "index.parquet"
VERSION = 1
"""Of the file's layout; one of another is refused, and `copernicus data index --fresh` makes it anew."""
UNREAD = Stamp(-1, "")
"""Of a shard that could not be read; no file has it."""
_METADATA = b"copernicus_index"

_AT = pa.struct([
    ("dtype", pa.string()), ("shape", pa.list_(pa.int32())), ("offset", pa.int64()), ("member", pa.int64()),
    ("size", pa.int64()), ("whole", pa.string()), ("days", pa.list_(pa.int32())), ("lon", pa.list_(pa.float64())),
    ("lat", pa.list_(pa.float64())), ("local", pa.list_(pa.string())), ("files", pa.list_(pa.string())),
])  # fmt: skip
_PROBLEM = pa.struct([("where", pa.string()), ("reason", pa.string()), ("detail", pa.string())])
SCHEMA = pa.schema([
    ("shard", pa.string()), ("grid", pa.string()), ("lon", pa.float64()), ("lat", pa.float64()),
    ("missing", pa.list_(pa.string())), ("problems", pa.list_(_PROBLEM)), *((name, _AT) for name in SENSORS),
])  # fmt: skip


@dataclass(frozen=True)
class GridEntry:
    """One grid: where its sensors' numbers lie in ``shard``. ``lon``, ``lat``: degrees."""

    key: str
    shard: str
    stamp: Stamp
    lon: float
    lat: float
    sensors: dict[str, SensorAt]


def _sensor(row: dict[str, Any]) -> SensorAt:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in row.items()}
    return SensorAt(**values)


@dataclass(frozen=True)
class Shard:
    """A shard as it was when it was indexed."""

    uri: str
    stamp: Stamp
    digest: str
    problems: tuple[Problem, ...] = ()


@dataclass(frozen=True)
class GridIndex:
    """A sequence of `GridEntry`, in shard order, kept as an Arrow table: a view of ``rows`` (row numbers) of it.

    ``table`` has the file's columns, with the number of the shard in ``shards`` in place of its name.
    """

    table: pa.Table
    shards: tuple[Shard, ...]
    rows: np.ndarray
    problems: tuple[Problem, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> GridEntry:
        return self.entries([number])[0]

    def __iter__(self) -> Iterator[GridEntry]:
        for start in range(0, len(self), 256):
            yield from self.entries(range(start, min(start + 256, len(self))))

    def entries(self, numbers: Iterable[int]) -> list[GridEntry]:
        """Several at once, which costs less than one after another."""
        rows = self.table.take(pa.array([int(self.rows[n]) for n in numbers], pa.int64()))
        return [self._entry(row) for row in rows.to_pylist()]

    def _entry(self, row: dict[str, Any]) -> GridEntry:
        shard = self.shards[row["shard"]]
        sensors = {name: _sensor(row[name]) for name in SENSORS if row[name] is not None}
        return GridEntry(row["grid"], shard.uri, shard.stamp, row["lon"], row["lat"], sensors)

    @property
    def keys(self) -> list[str]:
        return self.table["grid"].take(pa.array(self.rows)).to_pylist()

    @property
    def grids_seen(self) -> int:
        """Grids in the shards, usable or not; a shard that cannot be read at all counts as one."""
        return self.table.num_rows + sum(bool(shard.problems) for shard in self.shards)

    @property
    def fingerprint(self) -> str:
        """Of names, keys, layouts and dates: the same data give the same value anywhere."""
        return hashlib.sha256(json.dumps([shard.digest for shard in self.shards]).encode()).hexdigest()[:16]

    def having(self, sensors: Sequence[str], require: str = "any") -> GridIndex:
        """The grids that have any of the sensors, or ("all") every one of them.

        Raises:
            InputError: there is none.
        """
        there = np.stack([self.table[name].is_valid().to_numpy() for name in sensors])[:, self.rows]
        chosen = self.rows[there.all(0) if require == "all" else there.any(0)]
        if not len(chosen):
            seen = "; ".join(str(p) for p in self.problems[:3]) or "the shards hold none"
            raise InputError(f"no grid with {require} of the sensors {', '.join(sensors)}: {seen}")
        return dataclasses.replace(self, rows=chosen)

    def split(self, fraction: float, seed: int) -> tuple[GridIndex, GridIndex]:
        """(training, held-out) grids. A grid's side depends on (seed, its key) alone, so it never changes sides when
        shards are added. At least one grid is held out when ``fraction`` > 0."""
        if fraction <= 0:
            return self, dataclasses.replace(self, rows=self.rows[:0], problems=())
        score = np.array([uniform("held-out", seed, key) for key in self.keys])
        held = score < fraction
        if not held.any():
            held[int(np.argmin(score))] = True
        return (
            dataclasses.replace(self, rows=self.rows[~held]),
            dataclasses.replace(self, rows=self.rows[held], problems=()),
        )


def index_shards(shards: str | Sequence[str]) -> GridIndex:
    """Index shards in this process, one after another, keeping nothing on disk.

    Raises:
        InputError: a shard does not exist.
    """
    return from_surveys([survey_or_fault(uri) for uri in expand(shards)])


def survey_or_fault(uri: str) -> ShardSurvey:
    """As `survey_shard`; a shard that cannot be read is a problem of its own, with a stamp that no file has."""
    try:
        return survey_shard(uri)
    except OSError as error:
        return ShardSurvey(uri, UNREAD, [], [Problem(uri, "unreadable", str(error))])


def to_table(surveys: Iterable[ShardSurvey]) -> pa.Table:
    """The rows of these shards, and their stamps in the schema's metadata."""
    rows, shards = [], []
    for survey in surveys:
        shards.append({
            "uri": survey.uri, "stamp": list(survey.stamp), "digest": survey.digest,
            "problems": [dataclasses.astuple(p) for p in survey.problems],
        })  # fmt: skip
        for grid in survey.grids:
            rows.append({
                "shard": survey.uri, "grid": grid.key, "lon": grid.lon, "lat": grid.lat,
                "missing": [name for name in SENSORS if name not in grid.sensors],
                "problems": [vars(p) for p in grid.problems],
                **{name: vars(at) for name, at in grid.sensors.items()},
            })  # fmt: skip
    return _stamped(pa.Table.from_pylist(rows, schema=SCHEMA), shards)


def _stamped(table: pa.Table, shards: list[dict[str, Any]]) -> pa.Table:
    described = json.dumps({"version": VERSION, "shards": shards})
    return table.replace_schema_metadata({_METADATA: described.encode()})


def _shards(table: pa.Table) -> list[dict[str, Any]]:
    described = json.loads((table.schema.metadata or {})[_METADATA])
    if described["version"] != VERSION:
        raise ValueError(f"layout {described['version']}, this program writes {VERSION}")
    return described["shards"]


def concat(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables of several shards as one."""
    together = pa.concat_tables([t.replace_schema_metadata() for t in tables])
    return _stamped(together, [shard for table in tables for shard in _shards(table)])


def from_surveys(surveys: Iterable[ShardSurvey]) -> GridIndex:
    return to_index(to_table(surveys))


def to_index(table: pa.Table) -> GridIndex:
    """A table's usable grids. Of grids with one key the first is taken, the others are named as problems."""
    described = _shards(table)
    shards = tuple(
        Shard(s["uri"], Stamp(*s["stamp"]), s["digest"], tuple(Problem(*p) for p in s["problems"])) for s in described
    )
    numbers = {shard.uri: number for number, shard in enumerate(shards)}
    names = table["shard"].combine_chunks().dictionary_encode()
    lookup = np.array([numbers[name] for name in names.dictionary.to_pylist()], np.int32)
    shard_numbers = lookup[names.indices.to_numpy()] if table.num_rows else np.zeros(0, np.int32)
    table = table.set_column(0, "shard", pa.array(shard_numbers)).replace_schema_metadata().combine_chunks()

    problems = [p for shard in shards for p in shard.problems]
    listed = table["problems"].combine_chunks()
    problems += [Problem(**p) for p in listed.flatten().to_pylist()]
    keys = table["grid"].to_pylist()
    first: dict[str, int] = {}
    again = [i for i, key in enumerate(keys) if first.setdefault(key, i) != i]
    for i in again:
        other = shards[shard_numbers[first[keys[i]]]].uri
        problems.append(Problem(f"{shards[shard_numbers[i]].uri}:{keys[i]}", "duplicate_grid", f"taken from {other}"))
    usable = np.zeros(table.num_rows, bool)
    for name in SENSORS:
        usable |= table[name].is_valid().to_numpy()
    usable[again] = False
    return GridIndex(table, shards, np.flatnonzero(usable), tuple(problems))


def write_index(table: pa.Table, path: str) -> None:
    """Write an index file, shards named relative to its folder where they lie below it."""
    folder = _folder(path)

    def short(uri: str) -> str:
        return uri.removeprefix(folder)

    names = table["shard"].combine_chunks().dictionary_encode()
    relative = pa.DictionaryArray.from_arrays(
        names.indices, pa.array([short(n) for n in names.dictionary.to_pylist()], pa.string())
    )
    shards = [{**s, "uri": short(s["uri"])} for s in _shards(table)]
    stored = _stamped(table.set_column(0, "shard", relative.cast(pa.string())), shards)
    sink = pa.BufferOutputStream()
    pq.write_table(stored, sink, compression="zstd", row_group_size=16384)
    write_bytes(path, sink.getvalue().to_pybytes())


def read_index(path: str) -> pa.Table:
    """The table of an index file, shards under their full names.

    Raises:
        InputError: no such file, or not an index of this layout.
    """
    try:
        table = pq.read_table(pa.BufferReader(read_bytes(path)))
        shards = _shards(table)
        table = table.select(SCHEMA.names).cast(SCHEMA)
    except FileNotFoundError:
        raise InputError(f"no index {path}; make it with `copernicus data index SHARDS --out {path}`") from None
    except (pa.ArrowException, KeyError, ValueError, TypeError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(
            f"{path} is not an index ({reason}); make it anew with `copernicus data index SHARDS --fresh`"
        ) from None
    folder = _folder(path)

    def full(name: str) -> str:
        return name if "://" in name or os.path.isabs(name) else folder + name

    names = table["shard"].combine_chunks().dictionary_encode()
    absolute = pa.DictionaryArray.from_arrays(
        names.indices, pa.array([full(n) for n in names.dictionary.to_pylist()], pa.string())
    )
    table = table.set_column(0, "shard", absolute.cast(pa.string()))
    return _stamped(table, [{**s, "uri": full(s["uri"])} for s in shards])


def select_shards(table: pa.Table, uris: Sequence[str]) -> pa.Table:
    """The rows of these shards, in this order of shards."""
    by_uri = {s["uri"]: s for s in _shards(table)}
    order = {uri: number for number, uri in enumerate(uris)}
    position = np.array([order.get(uri, -1) for uri in table["shard"].to_pylist()], np.int64)
    chosen = np.flatnonzero(position >= 0)
    chosen = chosen[np.argsort(position[chosen], kind="stable")]
    return _stamped(table.take(pa.array(chosen)).replace_schema_metadata(), [by_uri[uri] for uri in uris])


def stamps(table: pa.Table) -> dict[str, Stamp]:
    """Shard -> its stamp when it was indexed."""
    return {s["uri"]: Stamp(*s["stamp"]) for s in _shards(table)}


def current_stamp(uri: str) -> Stamp | None:
    """The stamp of a shard as it is now; None where it cannot be read."""
    try:
        return open_file(uri).stamp()
    except OSError:
        return None


def default_path(shards: Sequence[str]) -> str:
    """Next to the shards.

    Raises:
        InputError: they lie in several folders.
    """
    folders = sorted({(base.rpartition("/")[0], options) for base, options in map(split_options, shards)})
    if len(folders) > 1:
        raise InputError(
            f"the shards lie in {len(folders)} folders ({folders[0][0]}, {folders[1][0]}, ...); say --out FILE"
        )
    return f"{folders[0][0]}/{FILE_NAME}{folders[0][1]}"


def _folder(path: str) -> str:
    full = path if "://" in path else os.path.abspath(path)
    return split_options(full)[0].rpartition("/")[0] + "/"
