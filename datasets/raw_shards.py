"""From the raw layout to published shards, in units of work that do not know of each other.

A unit is a block of grids that makes one shard, or a numbered chunk of archives that makes some. Each writes

    example-000012.tar              as published; appears under its name only when it is whole
    manifest/example-000012.json    then: what is in it, its size and checksum, and what could not be used

so a unit is finished when its entries are there and its shards have the sizes they say. What a unit writes depends on
the source and the settings alone: not on the order of the units, on who does them, or on how often they were begun.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from copernicus.datasets.baseline import UNKNOWN
from copernicus.datasets.chunks import GRIDS_PER_CHUNK, extract_chunk
from copernicus.datasets.raw import RawLayout, load_grid
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import Grid, Problem, shard_path, write_shard


@dataclass(frozen=True)
class Settings:
    """What decides, with the source, the bytes of the shards. ``sizes``: sensor -> stored side, where it is not the
    published one; ``s2_offset``: see `baseline`; ``seed``: of the dates that are repeated."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    grids_per_shard: int = 100
    s2_offset: str = "auto"
    seed: int = 0


@dataclass(frozen=True)
class Unit:
    """``first``: number of its first shard. Either the grids of ``layout``, or the ``archives`` of a chunk by sensor,
    where ``missing`` are the sensors of which other chunks have one."""

    name: str
    first: int
    layout: RawLayout | None = None
    archives: Mapping[str, Path] = field(default_factory=dict)
    missing: tuple[str, ...] = ()


def folder_units(layout: RawLayout, settings: Settings) -> list[Unit]:
    """Blocks of grids in the list's order, a shard each."""
    keys, size = layout.keys, settings.grids_per_shard
    return [
        Unit(shard_path(Path(), number).name, number, layout.part(keys[number * size : (number + 1) * size]))
        for number in range(-(-len(keys) // size))
    ]


def chunk_units(chunks: Mapping[int, Mapping[str, Path]], settings: Settings) -> list[Unit]:
    """A unit a chunk. Its shards have numbers of their own, whatever the others hold: chunk 1 the first ten, and so on
    (of 100 grids each; a chunk has 1,000)."""
    shards = -(-GRIDS_PER_CHUNK // settings.grids_per_shard)
    sensors = {sensor for archives in chunks.values() for sensor in archives}
    return [
        Unit(
            f"chunk {number:03d}",
            (number - min(1, *chunks)) * shards,
            archives=archives,
            missing=tuple(s for s in SENSORS if s in sensors and s not in archives),
        )
        for number, archives in chunks.items()
    ]


def convert_unit(unit: Unit, out: Path, settings: Settings, verify: bool = False) -> int:
    """Writes a unit's shards and their entries, save those that are there already; returns its number of grids.

    Args:
        verify: shards whose checksum is not that of their entry are written anew.

    Raises:
        InputError: a chunk with more grids than a chunk has.
        OSError: the storage failed. What is written by then is whole, and the same call goes on.
    """
    if (done := finished(unit, out, verify)) is not None:
        return sum(entry["grids"] for entry in done)
    if unit.layout is not None:
        return _convert(unit, unit.layout, [], out, settings, verify)
    problems = [Problem(unit.name, "missing_archive", f"none of {sensor}") for sensor in unit.missing]
    with _workplace(out) as work:
        layout, damage = extract_chunk(unit.archives, work)
        if len(layout.keys) > GRIDS_PER_CHUNK:
            raise InputError(f"{unit.name} has {len(layout.keys)} grids; a published one has {GRIDS_PER_CHUNK} at most")
        return _convert(unit, layout, problems + damage, out, settings, verify)


def _convert(
    unit: Unit, layout: RawLayout, problems: list[Problem], out: Path, settings: Settings, verify: bool
) -> int:
    """``problems``: of the unit as a whole; they stand in its first entry."""
    keys, size = layout.keys, settings.grids_per_shard
    parts = max(1, -(-len(keys) // size))
    total = 0
    for part in range(parts):
        number = unit.first + part
        entry = read_entry(out, number)
        if entry is None or not _is_there(entry, out, verify):
            block = keys[part * size : (part + 1) * size]
            entry = _convert_block(layout, block, [] if part else problems, shard_path(out, number), settings)
            entry |= {"part": part, "parts": parts}
            write_json(_entry_path(out, number), entry)
        total += entry["grids"]
    return total


def _convert_block(
    layout: RawLayout, keys: Sequence[str], problems: Sequence[Problem], path: Path, settings: Settings
) -> dict[str, Any]:
    """Writes one shard, or none where no grid can be used, and returns its entry."""
    found = list(problems)
    notes: Counter[str] = Counter()
    written: list[str] = []
    sensors: Counter[str] = Counter()

    def grids() -> Iterator[Grid]:
        for key in keys:
            grid, faults = load_grid(layout, key, settings.sizes, settings.s2_offset, settings.seed, notes)
            found.extend(faults)
            if not grid.arrays:
                found.append(Problem(f"grid {key}", "no_image", "not one of its images can be used; left out"))
                continue
            written.append(key)
            sensors.update(list(grid.arrays))
            yield grid

    some = grids()
    first = next(some, None)
    if first is not None:
        write_shard(itertools.chain([first], some), path)
    return {
        "shard": path.name if first is not None else None,
        "bytes": path.stat().st_size if first is not None else 0,
        "sha256": checksum(path) if first is not None else None,
        "grids": len(written),
        "keys": written,
        "sensors": {sensor: sensors[sensor] for sensor in SENSORS if sensor in sensors},
        "images": {sensor: notes[sensor] for sensor in SENSORS if sensor in notes},
        UNKNOWN: notes[UNKNOWN],
        "problems": [[p.where, p.reason, p.detail] for p in found],
    }


def finished(unit: Unit, out: Path, verify: bool = False) -> list[dict[str, Any]] | None:
    """The entries of a unit's shards if all of it is there, else None. ``verify``: compare checksums, too."""
    entries: list[dict[str, Any]] = []
    while not entries or len(entries) < entries[0]["parts"]:
        entry = read_entry(out, unit.first + len(entries))
        if entry is None or not _is_there(entry, out, verify):
            return None
        entries.append(entry)
    return entries


def _is_there(entry: Mapping[str, Any], out: Path, verify: bool) -> bool:
    if entry["shard"] is None:
        return True
    path = out / entry["shard"]
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        return False
    return not verify or checksum(path) == entry["sha256"]


def read_entry(out: Path, number: int) -> dict[str, Any] | None:
    """What is written of a shard; None: nothing, or nothing that can be read."""
    try:
        entry = json.loads(_entry_path(out, number).read_text())
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) and {"shard", "bytes", "sha256", "grids", "parts"} <= entry.keys() else None


def _entry_path(out: Path, number: int) -> Path:
    return out / "manifest" / f"{shard_path(out, number).stem}.json"


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """A file that appears under its name only when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with open(part, "w") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def _workplace(out: Path) -> Iterator[Path]:
    """A folder for unpacked archives, on the disk of the shards; removed in the end. It is locked as long as its process
    lives, so that nobody else removes it."""
    (out / ".work").mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=out / ".work"))
    try:
        with open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "images").mkdir()
            yield folder / "images"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clear_leftovers(out: Path) -> int:
    """Removes what killed processes left behind: half-written files, and unpacked archives that no process holds any more.
    Returns how many there were, those that are held among them."""
    parts, folders = [*out.glob(".*.part-*"), *out.glob("manifest/.*.part-*")], list(out.glob(".work/*"))
    for path in parts:
        path.unlink(missing_ok=True)
    for folder in folders:
        with contextlib.suppress(OSError), open(folder / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):  # absent, or another process is at work in it
        (out / ".work").rmdir()
    return len(parts) + len(folders)
