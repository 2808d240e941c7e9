"""Split files: which samples a split has, and what its lists say of them.

Lists are read by position: they come with a first line of column names (of two kinds) and without one.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath


@dataclass(frozen=True)
class Entry:
    """One sample as its split file lists it."""

    id: str
    fields: Mapping[str, str]  # what the task's path templates ask for
    label: str = ""  # class name, where the split file tells it
    labels: tuple[int, ...] = ()  # 0 or 1 for each class, where it tells several


class SplitError(ValueError):
    """A split file is not what it should be; the message says where."""


def list_names(text: str) -> list[Entry]:
    """One sample a line, with or without its suffix; used in the paths as ``{name}``."""
    return [Entry(name, {"name": name}) for name in map(_stem, _lines(text))]


def list_class_files(text: str) -> list[Entry]:
    """One ``Class_number.jpg`` a line (the images are .tif), used as ``{class_name}`` and ``{stem}``."""
    entries = []
    for stem in map(_stem, _lines(text)):
        class_name = stem.split("_")[0]
        entries.append(Entry(stem, {"class_name": class_name, "stem": stem}, label=class_name))
    return entries


def list_dfc(text: str) -> list[Entry]:
    """One label file a line; the images are called the same with another sensor. Used as ``{dfc}``, ``{s1}``, ``{s2}``."""
    return [
        Entry(stem, {"dfc": stem, "s1": stem.replace("dfc", "s1"), "s2": stem.replace("dfc", "s2")})
        for stem in map(_stem, _lines(text))
    ]


def list_images(text: str) -> list[Entry]:
    """A place and the image chosen for it, ``pid,file``, a line; used as ``{pid}`` and ``{file}``."""
    entries = []
    for number, row in enumerate(_rows(text), 1):
        if len(row) != 2:
            raise SplitError(f"line {number} has {len(row)} columns, expected 2: a place and an image")
        pid = _stem(row[0])
        entries.append(Entry(pid, {"pid": pid, "file": _stem(row[1])}))
    return entries


def list_bigearthnet_s1(text: str) -> list[Entry]:
    """Path of the radar image, path of the optical one, 19 labels; used as ``{image}``: the radar image."""
    return _list_labels(text, names=2, name=0, classes=19)


def list_bigearthnet_s2(text: str) -> list[Entry]:
    """Path of the radar image, path of the optical one, 19 labels; used as ``{image}``: the optical image."""
    return _list_labels(text, names=2, name=1, classes=19)


def list_lc100(text: str) -> list[Entry]:
    """A place and its 23 labels; used as ``{image}``: the place's name."""
    return _list_labels(text, names=1, name=0, classes=23)


def list_grid_dict(text: str) -> list[Entry]:
    """A JSON dictionary id -> {"path": folder, ...}, in the file's order, used as ``{path}``."""
    grids = json.loads(text)
    if not isinstance(grids, dict) or not all(isinstance(grid, dict) and "path" in grid for grid in grids.values()):
        raise SplitError('it must be a dictionary of samples, each with a "path"')
    return [Entry(key, {"path": str(grid["path"]).strip("/")}) for key, grid in grids.items()]


def check_names(names: Iterable[str]) -> None:
    """Names become paths below the task's folder: none may lead out of it.

    Raises:
        SplitError: an absolute name, or one with ``..`` in it.
    """
    for name in names:
        if not name or "\0" in name or "\\" in name or name.startswith("/") or ".." in PurePosixPath(name).parts:
            raise SplitError(f"the name {name!r} leads out of the task's folder")


def _list_labels(text: str, names: int, name: int, classes: int) -> list[Entry]:
    entries = []
    for number, row in enumerate(_rows(text), 1):
        if len(row) != names + classes:
            raise SplitError(
                f"line {number} has {len(row)} columns, expected {names + classes}: {names} of names, {classes} of 0 or 1"
            )
        labels = [_binary(cell) for cell in row[names:]]
        if None in labels:
            # Names of columns may be numbers, too (0, 1, 2, ...); a line of labels has nothing but 0 and 1.
            if number == 1:
                continue
            raise SplitError(f"line {number}: a label other than 0 or 1")
        image = _stem(row[name])
        entries.append(Entry(image.rsplit("/", 1)[-1], {"image": image}, labels=tuple(map(int, labels))))  # type: ignore[arg-type]
    return entries


def _binary(cell: str) -> int | None:
    return {"0": 0, "1": 1, "0.0": 0, "1.0": 1}.get(cell.strip())


def _lines(text: str) -> list[str]:
    return [line for line in map(str.strip, text.splitlines()) if line]


def _rows(text: str) -> list[list[str]]:
    return list(csv.reader(_lines(text)))


def _stem(name: str) -> str:
    return name.strip().removesuffix(".tif").removesuffix(".jpg")
