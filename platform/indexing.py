"""The index of the shards (`parts.py` says where they are read): resumed where it stopped, and never used for shards that
have changed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from copernicus.datasets.index import (
    GridIndex,
    concat,
    default_path,
    read_index,
    select_shards,
    stamps,
    survey_or_fault,
    to_index,
    to_table,
    write_index,
)
from copernicus.datasets.sensors import InputError
from copernicus.datasets.storage import Stamp
from copernicus.datasets.storage import stamps as file_stamps
from copernicus.platform.parts import Parts, Report, current_stamps

REMOTE_READS_PER_CPU = 4
"""Reading headers from an object store waits for answers most of the time."""


def open_index(shards: Sequence[str], path: str | None, keep: Path, report: Report) -> GridIndex:
    """The index of these shards (`expand` has listed them), for training: from ``path`` or the file next to the shards
    where there is one, made or brought up to date where needed and then kept at ``path``, or in the folder ``keep``.

    Raises:
        InputError: ``path`` is no index.
    """
    found = path or _beside(shards)
    try:
        table = None if found is None else _read(found)
    except InputError:
        if path is not None:
            raise
        table = None  # something else, or of another layout, that happens to lie next to the shards
    if table is not None and not _stale(table, shards):
        return to_index(select_shards(table, shards))  # the file may be of more shards than these
    made = keep / f"{hashlib.sha256(os.linesep.join(shards).encode()).hexdigest()[:12]}.parquet"
    return to_index(select_shards(update_index(shards, path or str(made), report), shards))


def update_index(shards: Sequence[str], path: str, report: Report, fresh: bool = False) -> pa.Table:
    """Bring the index file up to date with the shards: those that are unchanged since are not read again. Other shards
    that it covers stay in it as long as they exist. What was done is kept beside the file until all is, so that an
    interrupted job goes on where it stopped.

    Raises:
        InputError: the file is no index.
        OSError: it cannot be written; what was done so far is kept.
    """
    with _alone(path):
        return _updated(shards, path, report, fresh)


@contextlib.contextmanager
def _alone(path: str) -> Iterator[None]:
    """Two runs of one machine that want the same index wait for each other, and the second finds it made."""
    name = hashlib.sha256(path.encode()).hexdigest()[:16]
    with open(Path(tempfile.gettempdir()) / f"copernicus-{os.getuid()}-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _updated(shards: Sequence[str], path: str, report: Report, fresh: bool) -> pa.Table:
    table = None if fresh else _read(path)
    if table is not None:
        others = [uri for uri in stamps(table) if uri not in set(shards)]
        there = [uri for uri, stamp in zip(others, current_stamps(others), strict=True) if stamp is not None]
        shards = [*there, *shards]
    todo = _stale(table, shards)
    if not todo and table is not None and list(stamps(table)) == list(shards):
        return table
    parts = Parts(path, _surveyed, _stamp, _problems, REMOTE_READS_PER_CPU)
    if fresh:
        parts.remove()
    parts.make(todo, report, before=len(shards) - len(todo))
    done = {uri: pq.read_table(parts.path(uri)) for uri in todo}
    if table is not None:
        known = stamps(table)
        done[""] = select_shards(table, [uri for uri in shards if uri in known and uri not in done])
    merged = select_shards(concat(list(done.values())), shards)
    write_index(merged, path)
    parts.remove()
    return merged


def _surveyed(uri: str) -> pa.Table:
    return to_table([survey_or_fault(uri)])


def _stamp(table: pa.Table, uri: str) -> Stamp | None:
    try:
        return stamps(table).get(uri)
    except (KeyError, ValueError):  # a part of another layout
        return None


def _problems(table: pa.Table) -> int:
    return sum(len(problems) for problems in table["problems"].to_pylist())


def _stale(table: pa.Table | None, shards: Sequence[str]) -> list[str]:
    """The shards that the table lacks, or that have changed since."""
    known: dict[str, Stamp] = {} if table is None else stamps(table)
    there = [uri for uri in shards if uri in known]
    same = {uri for uri, stamp in zip(there, current_stamps(there), strict=True) if stamp == known[uri]}
    return [uri for uri in shards if uri not in same]


def _exists(path: str) -> bool:
    return file_stamps([path])[0] is not None


def _read(path: str) -> pa.Table | None:
    return read_index(path) if _exists(path) else None


def _beside(shards: Sequence[str]) -> str | None:
    """The index file next to the shards, where there is one."""
    try:
        path = default_path(shards)
    except InputError:  # several folders
        return None
    return path if _exists(path) else None
