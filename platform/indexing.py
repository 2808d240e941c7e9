"""The index of the shards as a Ray Data job: resumed where it stopped, and never used for shards that have changed."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from copernicus.datasets.index import (
    GridIndex,
    concat,
    current_stamp,
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

Report = Callable[[float, float, str], None]
"""Called with shards done, shards in all, and a note."""

REMOTE_READS_PER_CPU = 4
"""Reading headers from an object store waits for answers most of the time."""


def open_index(shards: Sequence[str], path: str | None, keep: Path, report: Report) -> GridIndex:
    """The index of these shards (`expand` has listed them), for training: from ``path`` or the file next to the shards
    where there is one, made or brought up to date where needed and then kept at ``path``, or in the folder ``keep``.

    Raises:
        InputError: ``path`` is no index.
    """
    made = keep / f"{hashlib.sha256(os.linesep.join(shards).encode()).hexdigest()[:12]}.parquet"
    if path is None:
        beside = _beside(shards)
        path = beside if beside is not None and not _stale(_read(beside), shards) else str(made)
    return to_index(update_index(shards, path, report))


def update_index(shards: Sequence[str], path: str, report: Report, fresh: bool = False) -> pa.Table:
    """Bring the index file up to date with the shards: those that are unchanged since are not read again. What was done
    is kept beside the file until all is, so that an interrupted job goes on where it stopped.

    Raises:
        InputError: the file is no index.
        OSError: it cannot be written; what was done so far is kept.
    """
    table = None if fresh else _read(path)
    parts = _parts_folder(path)
    todo = _stale(table, shards)
    if not todo and table is not None and list(stamps(table)) == list(shards):
        return table
    done: dict[str, pa.Table] = {}
    if parts.is_dir() and not fresh:
        now = dict(zip(todo, _current(todo), strict=True))
        for uri in todo:
            kept = _kept(_part(parts, uri))
            if kept is not None and stamps(kept).get(uri) == now[uri]:
                done[uri] = kept
    todo = [uri for uri in todo if uri not in done]
    count = len(shards) - len(todo)
    report(count, len(shards), "")
    faults = 0
    if todo:
        parts.mkdir(parents=True, exist_ok=True)
        for uri, data in _survey(todo):
            _write_atomically(_part(parts, uri), data)
            done[uri] = pq.read_table(io.BytesIO(data))
            faults += sum(len(problems) for problems in done[uri]["problems"].to_pylist())
            count += 1
            report(count, len(shards), f"{faults} problems" if faults else "")
    if table is not None:
        known = stamps(table)
        done[""] = select_shards(table, [uri for uri in shards if uri in known and uri not in done])
    merged = select_shards(concat(list(done.values())), shards)
    write_index(merged, path)
    shutil.rmtree(parts, ignore_errors=True)
    return merged


def _survey(uris: Sequence[str]) -> Iterable[tuple[str, bytes]]:
    """Each shard's rows as a parquet file's bytes, in any order, read by Ray Data tasks."""
    import ray

    from copernicus.platform.stream import quiet_context

    quiet_context()
    remote = any("://" in uri for uri in uris)
    dataset = ray.data.from_items([{"uri": uri} for uri in uris], override_num_blocks=len(uris)).map_batches(
        _survey_batch, batch_size=None, num_cpus=1 / REMOTE_READS_PER_CPU if remote else 1
    )
    for row in dataset.iter_rows():
        yield row["uri"], row["part"]


def _survey_batch(batch: dict[str, Any]) -> dict[str, list[Any]]:
    parts = []
    for uri in batch["uri"]:
        sink = io.BytesIO()
        pq.write_table(to_table([survey_or_fault(str(uri))]), sink, compression="zstd")
        parts.append(sink.getvalue())
    return {"uri": list(batch["uri"]), "part": parts}


def _stale(table: pa.Table | None, shards: Sequence[str]) -> list[str]:
    """The shards that the table lacks, or that have changed since."""
    known: dict[str, Stamp] = {} if table is None else stamps(table)
    missing = [uri for uri in shards if uri not in known]
    there = [uri for uri in shards if uri in known]
    changed = {uri for uri, stamp in zip(there, _current(there), strict=True) if stamp != known[uri]}
    return [uri for uri in shards if uri in changed or uri in set(missing)]


def _current(uris: Sequence[str]) -> list[Stamp | None]:
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(current_stamp, uris))


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


def _parts_folder(path: str) -> Path:
    """On the driver's disk: next to a local index; for a remote one, in the working directory."""
    if "://" in path:
        return Path(f".index-{hashlib.sha256(path.encode()).hexdigest()[:12]}.parts")
    return Path(f"{path}.parts")


def _part(parts: Path, uri: str) -> Path:
    return parts / f"{hashlib.sha256(uri.encode()).hexdigest()[:24]}.parquet"


def _kept(part: Path) -> pa.Table | None:
    """What an interrupted job left; a file that a power failure cut short counts as none."""
    try:
        return pq.read_table(part)
    except (OSError, pa.ArrowException):
        return None


def _write_atomically(path: Path, data: bytes) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
