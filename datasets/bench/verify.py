"""Every sample of a benchmark's folder, read whole and compared with what it should be.

One row a sample, and one for each split as a whole. A *fault* is what a probe must not meet; a *note* is worth knowing and
harmless.

Faults of a split: missing_split (no such split file), bad_split (it is not as expected). Of a sample:

    missing_file    a file that the split file lists is not there
    unknown_class   the split file names a class that the task does not have
    unreadable      a file that cannot be read as a GeoTIFF
    wrong_bands     an image or a label with another number of bands
    all_nan         an image without a finite value
    unknown_codes   a label with codes that the task does not have
    label_size      a label that does not fit its image, by more than 5 % of its sides
    refused         anything else that the task's reader does not take
    not_finite      the reader gave an image with NaN or infinity
    listed_twice    the split file lists it before (`compare`)
    leak            another split lists it too (`compare`)

Notes: subset, superset (fewer or more samples than published), other_size (not the published number of pixels), constant (an
image of one number), some_nan (less than half of the values are finite), no_label (no pixel with a known label), no_date,
label_pixels (a label that fits its image, but not pixel by pixel), same_pixels (another sample has the very same image).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import rasterio
from rasterio.errors import RasterioError

from copernicus.datasets.bench.reader import GDAL_OPTIONS, UNKNOWN_TARGET, TaskDataset
from copernicus.datasets.bench.task import Entry, Task
from copernicus.datasets.bench.tasks import TASKS, get_task
from copernicus.datasets.sensors import InputError

LOW_FINITE = 0.5
TOLERANCE = 0.05
"""Of a label's sides against its image's."""

_SAID = pa.list_(pa.struct([("reason", pa.string()), ("detail", pa.string())]))
SCHEMA = pa.schema([
    ("task", pa.string()), ("split", pa.string()), ("sample", pa.string()), ("ok", pa.bool_()), ("faults", _SAID),
    ("notes", _SAID), ("dtype", pa.string()), ("shape", pa.list_(pa.int32())), ("finite", pa.float64()),
    ("min", pa.float64()), ("max", pa.float64()), ("digest", pa.string()),
])  # fmt: skip
"""Of the report. ``dtype``, ``shape`` (bands, height, width): of the first image's first file; ``finite``: share of all
images' values; ``min``, ``max``: as stored; ``digest``: of what the reader makes of the image."""


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
    """Names of the tasks that lie in a folder: in folders named as published, or in the folder itself.

    Raises:
        InputError: the folder is the root of a task, and nothing in it tells of which.
    """
    named = [task for task in TASKS.values() if (folder / task.directory).is_dir()]
    # Where tasks share a folder, those whose images are there.
    with_images = {task.directory for task in named if _has_images(task, folder / task.directory)}
    found = [t for t in named if t.directory not in with_images or _has_images(t, folder / t.directory)]
    if not found:
        found = _tasks_rooted_at(folder)
    return [task.name for task in found]


def _has_images(task: Task, root: Path) -> bool:
    return all((root / name).is_dir() for name in _first_folders(task))


def _first_folders(task: Task) -> set[str]:
    """Of the files' paths, as far as they are the same for all samples."""
    templates = [*(name for date in task.images for name in date), task.label_file]
    return {name.partition("/")[0] for name in templates if "/" in name and "{" not in name.partition("/")[0]}


def _tasks_rooted_at(folder: Path) -> list[Task]:
    path = folder.resolve()
    found = []
    for task in TASKS.values():
        if all((folder / task.split_file.format(split)).is_file() for split in task.splits) and _has_images(
            task, folder
        ):
            found.append(task)
    if len({task.directory for task in found}) < 2:
        return found
    if called := [task for task in found if path.parts[-1:] == Path(task.directory).parts[-1:]]:
        return called
    fitting = [task for task in found if _opens(task, folder)]
    if len({task.directory for task in fitting}) < 2:
        return fitting
    names = " or ".join(task.name for task in fitting)
    raise InputError(f"{folder} may be {names}: give it its published name ({fitting[0].directory}, ...)")


def _opens(task: Task, folder: Path) -> bool:
    try:
        return bool(task.open(folder, "train")[0])
    except InputError:
        return False


def list_split(name: str, folder: Path, split: str) -> tuple[Row, list[Entry]]:
    """The row of a split, and what it lists."""
    task, row = get_task(name), Row(name, split)
    try:
        path = task.find_root(folder, split) / task.split_file.format(split)
        entries = task.listing(path.read_text())
    except InputError as error:
        row.fault("missing_split", str(error))
        return row, []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        row.fault("bad_split", f"{path}: {error!r}")
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
        for index, entry in enumerate(part):
            row = Row(name, split, entry.id)
            if isinstance(opened, InputError):
                unknown = entry.label and entry.label not in task.classes
                row.fault("unknown_class" if unknown else "missing_file", str(opened))
            else:
                try:
                    _check_sample(opened, index, row)
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
    """The entries in parts that can be opened, or single ones that cannot: a reader opens all of a split or none."""
    if not entries:
        return
    try:
        yield dataclasses.replace(task, listing=_Listed(tuple(entries))).open(folder, split), entries
    except InputError as error:
        if len(entries) == 1:
            yield error, entries
            return
        half = len(entries) // 2
        yield from _open(task, folder, split, entries[:half])
        yield from _open(task, folder, split, entries[half:])


def _check_sample(dataset: TaskDataset, index: int, row: Row) -> None:
    task, record = dataset.task, dataset._records[index]
    images = [_check_image(task, paths, row) for paths in record.images]
    values = sum(image.values for image in images)
    row.finite = sum(image.finite for image in images) / values if values else None
    if record.label is not None:
        _check_label(task, record.label, images[0].size, row)
    try:
        sample = dataset[index]
    except InputError as error:
        if not row.faults:
            row.fault("refused", str(error))
        return
    if not np.isfinite(sample["image"].numpy()).all():
        row.fault("not_finite", "the reader's image has NaN or infinity")
    if task.date_regex and sample["metadata"][..., 2].isnan().any():
        row.note("no_date", "no file name tells it")
    row.digest = hashlib.blake2b(sample["image"].numpy().tobytes(), digest_size=16).hexdigest()


@dataclass
class _Image:
    """``size``: height and width, None where it could not be read; how many ``values`` it has, and how many ``finite``."""

    size: tuple[int, int] | None
    values: int = 0
    finite: int = 0


def _read(path: Path, row: Row) -> tuple[np.ndarray, tuple[str | None, ...]] | None:
    """A file's bands as stored, and their names; None, and a fault, where it cannot be read."""
    try:
        with rasterio.Env(**GDAL_OPTIONS), rasterio.open(path) as source:
            return source.read(), source.descriptions
    except (RasterioError, OSError) as error:
        row.fault("unreadable", f"{path}: {error}")
        return None


def _check_image(task: Task, paths: Sequence[Path], row: Row) -> _Image:
    """The files whose bands make the image of one date."""
    arrays, names = [], []
    for path in paths:
        if (found := _read(path, row)) is None:
            return _Image(None)
        arrays.append(found[0])
        names += found[1]
    first = arrays[0]
    if not row.dtype:
        row.dtype, row.shape = first.dtype.name, first.shape
    where = paths[0] if len(paths) == 1 else f"{paths[0]}, ..."
    expected = task.file_bands or task.sensor.bands
    if not set(task.sensor.bands) <= set(names) and len(names) != len(expected):
        row.fault("wrong_bands", f"{where}: {len(names)} bands, expected {len(expected)}")
    height, width = first.shape[1:]
    if (height, width) != (task.stored_size, task.stored_size):
        row.note("other_size", f"{height} x {width} pixels; published are {task.stored_size} x {task.stored_size}")
    image = _Image((height, width), sum(a.size for a in arrays))
    ranges = []
    for values in arrays:
        finite = values[np.isfinite(values)]
        image.finite += finite.size
        if finite.size:
            ranges.append((float(finite.min()), float(finite.max())))
    if not ranges:
        row.fault("all_nan", f"{where} has no finite value")
        return image
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    row.low, row.high = (
        min(low, math.inf if row.low is None else row.low),
        max(high, -math.inf if row.high is None else row.high),
    )
    if low == high:
        row.note("constant", f"{where}: all values are {low:g}")
    if image.finite < LOW_FINITE * image.values:
        row.note("some_nan", f"{where}: {image.finite / image.values:.1%} of the values are finite")
    return image


def _check_label(task: Task, path: Path, size: tuple[int, int] | None, row: Row) -> None:
    if (found := _read(path, row)) is None:
        return
    label_Chw = found[0]
    if len(label_Chw) != 1:
        row.fault("wrong_bands", f"{path}: {len(label_Chw)} bands, a label has 1")
        return
    label_hw = label_Chw[0]
    if size is not None:
        _check_size(task, path, label_hw.shape, size, row)
    if task.label_codes is None:
        with np.errstate(invalid="ignore"):
            known = np.abs(label_hw.astype(np.float64)) <= UNKNOWN_TARGET
    else:
        codes = np.unique(label_hw)
        if unknown := [float(code) for code in codes if code not in task.label_codes]:
            row.fault("unknown_codes", f"{path}: {unknown[:10]}; expected {sorted(task.label_codes)}")
        ignored = [code for code, target in task.label_codes.items() if target == task.ignore_index]
        known = ~np.isin(label_hw, ignored)
    if not known.any():
        row.note("no_label", f"{path}: no pixel with a known label")


def _check_size(task: Task, path: Path, label: tuple[int, ...], image: tuple[int, int], row: Row) -> None:
    """Labels have the image's pixels, or those of the size that a model is fed with (Sentinel-3 at 96, labels at 288)."""
    finer = max(1, task.input_size // task.stored_size)
    for scale in (1, finer):
        wanted = (image[0] * scale, image[1] * scale)
        if label == wanted:
            return
        if all(abs(have / want - 1) <= TOLERANCE for have, want in zip(label, wanted, strict=True)):
            row.note("label_pixels", f"{path}: {label[0]} x {label[1]} pixels, the image has {image[0]} x {image[1]}")
            return
    times = "" if finer == 1 else f" or {finer} times as many"
    row.fault("label_size", f"{path}: {label[0]} x {label[1]} pixels, the image has {image[0]} x {image[1]}{times}")


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
