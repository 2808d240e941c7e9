"""Every sample of a benchmark's folder, read whole and compared with what it should be.

One row a sample, and one for each split as a whole. A *fault* is what a probe must not meet; a *note* is worth knowing and
harmless.

Faults of a split: missing_split (no such split file), bad_split (it is not as expected). Of a sample:

    missing_file    a file is not there, no image is named for a place, or a name leads out of the folder
    unknown_class   the split file names a class that the task does not have
    other_task      it lists a sample of another task
    unreadable      a file that cannot be read as what it should be: a GeoTIFF, of one band where it is a label, all of
                    an image of one size, with a date in its name that is one
    wrong_bands     an image with another number of bands
    all_nan         an image without a finite value
    unknown_codes   a label with codes that the task does not have
    label_size      a label that does not fit its image
    refused         anything else that the task's reader does not take
    not_finite      the reader gave an image with NaN or infinity
    listed_twice    the split file lists it before (`compare`)
    leak            another split lists it too (`compare`)

Notes: subset, superset (fewer or more samples than published), other_size (not the published number of pixels), constant (an
image of one number), some_nan (less than half of the values are finite), no_label (no pixel with a known label), no_date,
same_pixels (another sample has the very same image).
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from copernicus.datasets.bench.geotiffs import Stored
from copernicus.datasets.bench.raster import Raster
from copernicus.datasets.bench.reader import UNKNOWN_TARGET, TaskDataset
from copernicus.datasets.bench.splits import Entry
from copernicus.datasets.bench.task import Task
from copernicus.datasets.bench.tasks import TASKS, VARIANTS, get_task
from copernicus.datasets.sensors import InputError

LOW_FINITE = 0.5

_SAID = pa.list_(pa.struct([("reason", pa.string()), ("detail", pa.string())]))
SCHEMA = pa.schema([
    ("task", pa.string()), ("split", pa.string()), ("sample", pa.string()), ("ok", pa.bool_()), ("faults", _SAID),
    ("notes", _SAID), ("dtype", pa.string()), ("shape", pa.list_(pa.int32())), ("finite", pa.float64()),
    ("min", pa.float64()), ("max", pa.float64()), ("digest", pa.string()),
])  # fmt: skip
"""Of the report. ``dtype``, ``shape`` (bands, height, width): of the first image; ``finite``: share of all images' values;
``min``, ``max``: as stored; ``digest``: of what the reader makes of the images."""


@dataclass
class Row:
    """What there is to say of a sample (see `SCHEMA`), or of a split (``sample`` empty). ``faults``, ``notes``: reason ->
    detail."""

    task: str
    split: str
    sample: str = ""
    faults: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    shape: tuple[int, ...] = ()
    finite: float | None = None
    low: float | None = None
    high: float | None = None
    digest: str = ""

    def fault(self, reason: str, detail: str = "") -> None:
        self.faults.setdefault(reason, detail)

    def note(self, reason: str, detail: str = "") -> None:
        self.notes.setdefault(reason, detail)


def to_table(rows: Iterable[Row]) -> pa.Table:
    """Rows with the columns of `SCHEMA`."""
    listed = [
        {
            "task": r.task, "split": r.split, "sample": r.sample, "ok": not r.faults, "faults": _said(r.faults),
            "notes": _said(r.notes), "dtype": r.dtype, "shape": r.shape, "finite": r.finite, "min": r.low,
            "max": r.high, "digest": r.digest,
        }
        for r in rows
    ]  # fmt: skip
    return pa.Table.from_pylist(listed, schema=SCHEMA)


def from_table(table: pa.Table) -> list[Row]:
    """The rows that `to_table` made a table of."""
    return [
        Row(
            r["task"], r["split"], r["sample"],
            {s["reason"]: s["detail"] for s in r["faults"]}, {s["reason"]: s["detail"] for s in r["notes"]},
            r["dtype"], tuple(r["shape"]), r["finite"], r["min"], r["max"], r["digest"],
        )
        for r in table.to_pylist()
    ]  # fmt: skip


def _said(reasons: dict[str, str]) -> list[dict[str, str]]:
    return [{"reason": reason, "detail": detail} for reason, detail in reasons.items()]


def find_tasks(folder: Path) -> list[str]:
    """Names of the tasks that lie in a folder, in folders named as published or in the folder itself, each followed by its
    variants (`VARIANTS`) whose files are there.

    Raises:
        InputError: the folder is the root of a task, and nothing in it tells of which.
    """
    roots = {task.name: root for task in TASKS.values() if (root := _below(task, folder)) is not None}
    # Where tasks share a folder, those whose images are there.
    with_images = {TASKS[name].directory for name, root in roots.items() if _has_files(TASKS[name], root)}
    found = [
        task
        for task in TASKS.values()
        if task.name in roots and (task.directory not in with_images or _has_files(task, roots[task.name]))
    ]
    rooted = _rooted_at(folder)
    found = (
        found + [task for task in rooted if task.listing is None and task not in found]
        if found
        else _one_of(rooted, folder)
    )
    return [name for task in found for name in (task.name, *_variants(task, roots.get(task.name, folder)))]


def _below(task: Task, folder: Path) -> Path | None:
    """The task's own folder below this one, called as published or as the last part of that."""
    parts = Path(task.directory).parts
    below = [folder.joinpath(*parts[start:]) for start in range(len(parts))]
    return next((root for root in below if root.is_dir()), None)


def _variants(task: Task, root: Path) -> list[str]:
    return [v.name for v in VARIANTS.values() if v.name.startswith(f"{task.name}-") and _has_files(v, root)]


def _has_files(task: Task, root: Path) -> bool:
    return bool(_folders(task)) and all((root / name).is_dir() for name in _folders(task))


def _folders(task: Task) -> set[str]:
    """The first folders of the paths of images and labels, where they are the same for all samples."""
    templates = [*(name for date in task.images for name in date), task.label_file]
    return {name.partition("/")[0] for name in templates if "/" in name and "{" not in name.partition("/")[0]}


def _rooted_at(folder: Path) -> list[Task]:
    """Tasks whose split files and folders are in this folder itself. Several have them alike."""
    return [
        task
        for task in TASKS.values()
        if any((folder / task.split_file.format(split)).is_file() for split in task.splits)
        and (_has_files(task, folder) or task.listing is None)
    ]


def _one_of(tasks: list[Task], folder: Path) -> list[Task]:
    """Those of one directory: called like the folder, or the only ones whose samples can be read."""
    called = folder.resolve().name
    for chosen in (
        tasks,
        [task for task in tasks if called == Path(task.directory).name],
        [task for task in tasks if _reads(task, folder)],
    ):
        if len({task.directory for task in chosen}) == 1:
            return chosen
    if tasks:
        names = " or ".join(task.name for task in tasks)
        raise InputError(f"{folder} may be {names}: give it its published name ({tasks[0].directory}, ...)")
    return []


def _reads(task: Task, folder: Path) -> bool:
    for split in task.splits:
        try:
            return bool(task.open(folder, split)[0])
        except InputError:
            continue
    return False


def list_split(name: str, folder: Path, split: str) -> tuple[Row, list[Entry]]:
    """The row of a split, and what it lists."""
    task, row = get_task(name), Row(name, split)
    try:
        path = task.find_root(folder, split) / task.split_file.format(split)
    except InputError as error:
        row.fault("missing_split", str(error))
        return row, []
    try:
        if task.listing is None:
            entries = [Entry(sample, {}) for sample in task.open(folder, split).ids]
        else:
            entries = task.listing(path.read_text(encoding="utf-8-sig"))
    except (InputError, OSError, ValueError, csv.Error) as error:
        row.fault("bad_split", str(error) if isinstance(error, InputError) else f"{path}: {error}")
        return row, []
    published = task.splits[split]
    if not entries:
        row.fault("bad_split", f"{path} lists no samples")
    elif len(entries) != published:
        reason = "subset" if len(entries) < published else "superset"
        row.note(reason, f"{len(entries)} samples, published are {published}")
    return row, entries


def verify_samples(name: str, folder: Path, split: str, entries: Sequence[Entry]) -> list[Row]:
    """Read these samples of a split whole, and compare them with what they should be; a row each."""
    task = get_task(name)
    rows = []
    for opened, part in _open(task, folder, split, entries):
        number = {} if isinstance(opened, InputError) else {sample: i for i, sample in enumerate(opened.ids)}
        for entry in part:
            row = Row(name, split, entry.id)
            if isinstance(opened, InputError):
                row.fault(_not_opened(task, entry), str(opened))
            else:
                try:
                    _check_sample(opened, number[entry.id], row)
                except Exception as error:  # whatever a file does to its reader, the others are read
                    row.fault("refused", f"{type(error).__name__}: {error}")
            rows.append(row)
    return rows


@dataclass(frozen=True)
class _Listed:
    """A task's listing that gives these entries, whatever the split file says."""

    entries: tuple[Entry, ...]

    def __call__(self, text: str) -> list[Entry]:
        return list(self.entries)


def _open(
    task: Task, folder: Path, split: str, entries: Sequence[Entry]
) -> Iterator[tuple[TaskDataset | InputError, Sequence[Entry]]]:
    """The entries in parts that can be opened, or single ones that cannot: a reader opens all that is listed or nothing."""
    if not entries:
        return
    listing = None if task.listing is None else _Listed(tuple(entries))
    try:
        yield dataclasses.replace(task, listing=listing).open(folder, split, image_size=_near_stored(task)), entries
    except InputError as error:
        if len(entries) == 1:
            yield error, entries
            return
        half = len(entries) // 2
        yield from _open(task, folder, split, entries[:half])
        yield from _open(task, folder, split, entries[half:])


def _near_stored(task: Task) -> int:
    """A size for which little is resized: that costs more than all checks."""
    kernel = task.sensor.patch_kernel
    return max(kernel, task.stored_size // kernel * kernel)


def _not_opened(task: Task, entry: Entry) -> str:
    if entry.label and entry.label not in task.classes:
        return "unknown_class"
    return "other_task" if task.foreign and task.foreign in entry.id else "missing_file"


def _check_sample(dataset: TaskDataset, index: int, row: Row) -> None:
    task = dataset.task
    try:
        stored = dataset.stored(index)
    except InputError as error:
        return row.fault("unreadable", str(error))
    for raster, name in zip(stored.dates, stored.names, strict=True):
        _check_image(task, raster, name, row)
    values = sum(raster.values_Chw.size for raster in stored.dates)
    row.finite = sum(int(np.isfinite(raster.values_Chw).sum()) for raster in stored.dates) / values
    if isinstance(stored.target, np.ndarray):
        _check_label(task, stored.target, stored.target_name, row)
    try:
        sample = dataset[index]
    except InputError as error:
        return None if row.faults else row.fault(_refused(task, stored), str(error))
    if not np.isfinite(sample["image"].numpy()).all():
        row.fault("not_finite", f"{stored.names[0]}: what a model is fed has NaN or infinity")
    if task.date_regex and any(np.isnan(raster.days) for raster in stored.dates):
        row.note("no_date", f"{stored.names[0]}: the name tells none")
    row.digest = hashlib.blake2b(sample["image"].numpy().tobytes(), digest_size=16).hexdigest()
    return None


def _check_image(task: Task, raster: Raster, name: str, row: Row) -> None:
    values_Chw = raster.values_Chw
    height, width = values_Chw.shape[1:]
    if not row.dtype:
        row.dtype, row.shape = values_Chw.dtype.name, values_Chw.shape
    if (height, width) != (task.stored_size, task.stored_size):
        row.note("other_size", f"{height} x {width} pixels; published are {task.stored_size} x {task.stored_size}")
    finite = values_Chw[np.isfinite(values_Chw)]
    if not finite.size:
        return row.fault("all_nan", f"{name} has no finite value")
    low, high = float(finite.min()), float(finite.max())
    row.low = low if row.low is None else min(low, row.low)
    row.high = high if row.high is None else max(high, row.high)
    if low == high:
        row.note("constant", f"{name}: all values are {low:g}")
    if finite.size < LOW_FINITE * values_Chw.size:
        row.note("some_nan", f"{name}: {finite.size / values_Chw.size:.1%} of the values are finite")
    return None


def _check_label(task: Task, label_hw: np.ndarray, name: str, row: Row) -> None:
    """All of it: a reader that makes it smaller does not see every pixel."""
    if task.label_codes is None:
        known = np.abs(label_hw.astype(np.float64)) <= UNKNOWN_TARGET
    else:
        if unknown := [float(code) for code in np.unique(label_hw) if code not in task.label_codes]:
            row.fault("unknown_codes", f"{name}: {unknown[:10]}; expected {sorted(task.label_codes)}")
        ignored = [code for code, target in task.label_codes.items() if target == task.ignore_index]
        known = ~np.isin(label_hw, ignored)
    if not known.any():
        row.note("no_label", f"{name}: no pixel with a known label")


def _refused(task: Task, stored: Stored) -> str:
    """What to call it that the reader does not take a sample whose files can be read."""
    bands = len(task.file_bands or task.sensor.bands)
    if any(len(raster.values_Chw) != bands for raster in stored.dates):
        return "wrong_bands"
    label = stored.target
    if isinstance(label, np.ndarray) and any(raster.values_Chw.shape[1:] != label.shape for raster in stored.dates):
        return "label_size"
    return "refused"


def compare(rows: Sequence[Row]) -> None:
    """Adds what only shows when all rows of a task are together: samples listed twice, in two splits, or with the very same
    pixels. The second of two gets it, in the order of the rows."""
    first: dict[tuple[str, str], Row] = {}
    pixels: dict[tuple[str, str], Row] = {}
    for row in rows:
        if not row.sample:
            continue
        other = first.setdefault((row.task, row.sample), row)
        if other is not row and other.split == row.split:
            row.fault("listed_twice", f"in {row.split}")
        elif other is not row:
            row.fault("leak", f"in {other.split} too")
        elif row.digest and "constant" not in row.notes:
            same = pixels.setdefault((row.task, row.digest), row)
            if same is not row:
                row.note("same_pixels", f"as {same.sample} of {same.split}")
