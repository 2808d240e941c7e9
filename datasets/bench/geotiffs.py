"""The samples of a split that lie in GeoTIFFs: which files belong to each, and reading them."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio

from copernicus.datasets.bench.raster import GDAL_OPTIONS, Raster, find_date, read_label, read_raster
from copernicus.datasets.bench.splits import Entry, SplitError, check_names, list_images
from copernicus.datasets.bench.task import Task
from copernicus.datasets.sensors import InputError


@dataclass(frozen=True)
class Stored:
    """A sample as it is stored."""

    dates: tuple[Raster, ...]
    names: tuple[str, ...]  # what to call each date's image in a message
    target: np.ndarray | tuple[int, ...]  # a label map (h, w); or a 0 or 1 for each class
    target_name: str


@dataclass(frozen=True)
class Record:
    """One sample and its files."""

    entry: Entry
    images: tuple[tuple[Path, ...], ...]
    label: Path | None

    def files(self) -> list[Path]:
        return [path for date in self.images for path in date] + ([self.label] if self.label else [])


class GeoTiffSamples:
    """The split's samples, in the order of its split file, all their files checked to exist.

    Raises:
        InputError: a split file that is not as expected, or files that are missing; named.
    """

    def __init__(self, task: Task, root: Path, split: str) -> None:
        self.task, self.root = task, root
        self.lists = [root / task.split_file.format(split)]
        entries = _list_entries(task, self.lists[0])
        if task.static_file:
            self.lists.append(root / task.static_file.format(split))
            entries = _name_images(task, entries, *self.lists)
        self.records = _find_files(task, root, entries, self.lists[0])
        self.ids = [record.entry.id for record in self.records]

    def files(self) -> list[Path]:
        return [*self.lists, *(path for record in self.records for path in record.files())]

    def read(self, index: int) -> Stored:
        record = self.records[index]
        with rasterio.Env(**GDAL_OPTIONS):
            dates = tuple(read_raster(paths, self.task.date_regex) for paths in record.images)
            if record.label is not None:
                target: np.ndarray | tuple[int, ...] = read_label(record.label)
            elif record.entry.labels:
                target = record.entry.labels
            else:
                target = tuple(int(name == record.entry.label) for name in self.task.classes)
        names = tuple(", ".join(map(str, paths)) for paths in record.images)
        return Stored(dates, names, target, str(record.label or self.lists[0]))


def _list_entries(task: Task, path: Path) -> list[Entry]:
    assert task.listing is not None, task.name
    entries = _listed(task, path, task.listing)
    if not entries:
        raise InputError(f"{task.name}: {path} lists no samples")
    unknown = sorted({entry.label for entry in entries if entry.label} - set(task.classes))
    if unknown:
        raise InputError(f"{task.name}: {path} names unknown classes {unknown}; expected {', '.join(task.classes)}")
    foreign = [entry.id for entry in entries if task.foreign and task.foreign in entry.id]
    if foreign:
        raise InputError(f"{task.name}: {path} lists {foreign[0]}, which is of another task; expected {task.layout()}")
    return entries


def _listed(task: Task, path: Path, listing: Callable[[str], list[Entry]]) -> list[Entry]:
    try:
        entries = listing(path.read_text(encoding="utf-8-sig"))
        check_names(name for entry in entries for name in entry.fields.values())
    except SplitError as error:
        raise InputError(f"{task.name}: {path} is not as expected: {error}") from error
    except (ValueError, csv.Error) as error:
        raise InputError(f"{task.name}: {path} is not as expected ({error!r})") from error
    except OSError as error:
        raise InputError(f"{task.name}: {path} cannot be read ({error.strerror}); expected {task.layout()}") from error
    return entries


def _name_images(task: Task, entries: list[Entry], split_path: Path, static_path: Path) -> list[Entry]:
    """The entries with the image that the second list names for each."""
    files = {entry.id: entry.fields["file"] for entry in _listed(task, static_path, list_images)}
    lacking = [entry.id for entry in entries if entry.id not in files]
    if lacking:
        raise InputError(
            f"{task.name}: {static_path} names no image for {lacking[0]}"
            f"{f' (and {len(lacking) - 1} more)' if len(lacking) > 1 else ''}, listed in {split_path.name}"
        )
    return [Entry(entry.id, {**entry.fields, "file": files[entry.id]}, entry.label, entry.labels) for entry in entries]


def _find_files(task: Task, root: Path, entries: list[Entry], split_path: Path) -> list[Record]:
    names_in = lru_cache(maxsize=1024)(_names_in)
    missing: list[str] = []

    def find(template: str, entry: Entry, several: bool = False) -> list[Path]:
        path = root / template.format_map(entry.fields)
        if "*" not in path.name:
            if path.name not in names_in(path.parent):
                missing.append(f"{path} is missing")
            return [path]
        matches = [path.with_name(name) for name in names_in(path.parent) if fnmatch(name, path.name)]
        if not matches or (len(matches) > 1 and not several):
            missing.append(f"{path} matches {len(matches)} files, expected {'1 or more' if several else '1'}")
            return [path]
        return sorted(matches, key=_time(task))

    records = []
    for entry in entries:
        images: tuple[tuple[Path, ...], ...]
        if task.series:
            images = tuple((path,) for path in find(task.images[0][0], entry, several=True))
        else:
            images = tuple(tuple(find(template, entry)[0] for template in date) for date in task.images)
        records.append(Record(entry, images, find(task.label_file, entry)[0] if task.label_file else None))
    if missing:
        raise InputError(
            f"{task.name}: {missing[0]}{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}, listed in "
            f"{split_path.name}; expected {task.layout()}"
        )
    return records


def _time(task: Task) -> Callable[[Path], Any]:
    """The order of a place's images: that of time, then of names (two satellites may pass on the same day)."""
    return lambda path: (find_date(path, task.date_regex) if task.date_regex else 0.0, path.name)


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:  # no such folder: what is looked for in it is reported as missing
        return frozenset()
