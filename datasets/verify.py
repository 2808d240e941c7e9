"""Every member of a shard, read whole once and compared with what it should be.

One row a member, and one for each thing that is wrong with the tar or with a grid as a whole. A *fault* is what a
training run must not meet, or what is lost; a *note* is worth knowing and harmless.

Faults: what `survey` and `tar` find (truncated_tar, damaged_tar, duplicate_member, stray_member, missing_json, bad_json,
unsafe_or_broken_pth, wrong_shape), and of what is only found by reading everything:

    unreadable      the store failed to deliver the bytes
    wrong_dtype     not the published type
    all_nan         no finite value at all
    out_of_range    values that the sensor cannot deliver (see `plausible`), one of them beyond all bounds, or more than
                    1 % of them beyond the plausible
    wrong_unit      radar that is never below 0 dB (power, not decibels); reflectance that is below 0.01 everywhere
    constant        one number only in each band
    bad_nesting     the JSON's names do not nest like the array's leading axes
    missing_names   it has none for this sensor
    wrong_grid      they name another grid, or coordinates that are not the grid's; or its key is no grid's number
    far_patch       a patch more than 0.25 degrees from the grid's node
    wrong_date      before the mission's launch, or in the future
    missing_member  the JSON names images of a sensor that has no member
    duplicate_grid  another shard has it too (`duplicates`)

Notes: other_size (not the published number of pixels or dates), low_finite (less than half of the values), empty_images,
constant_images, constant_bands, flat (an elevation model of one number: the sea is 0), few_out_of_range, patch_counts (s1
and s2 differ), no_date, repeated_dates, unknown_member.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from copernicus.datasets.image_names import check_names, grid_number
from copernicus.datasets.plausible import PLAUSIBLE, measure
from copernicus.datasets.pth import PthError, read_tensor
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import LEADING_AXES, STORED_DTYPE
from copernicus.datasets.storage import File, open_file
from copernicus.datasets.stored import published_dates
from copernicus.datasets.survey import MAX_JSON_BYTES, survey_shard
from copernicus.datasets.tar import Member, Windows, walk

MANY_OUTSIDE = 0.01
LOW_FINITE = 0.5
DARK = 100
"""Digital numbers of Sentinel-2 that no scene stays below: the air alone scatters ten times that in blue."""

_SAID = pa.list_(pa.struct([("reason", pa.string()), ("detail", pa.string())]))
SCHEMA = pa.schema([
    ("shard", pa.string()), ("grid", pa.string()), ("member", pa.string()), ("sensor", pa.string()), ("ok", pa.bool_()),
    ("faults", _SAID), ("notes", _SAID), ("dtype", pa.string()), ("shape", pa.list_(pa.int32())),
    ("finite", pa.float64()), ("min", pa.float64()), ("max", pa.float64()), ("outside", pa.float64()),
])  # fmt: skip
"""Of the report. ``ok``: without a fault. ``finite``: share of the values; ``min``, ``max``: as stored; ``outside``: share
of the finite values outside the sensor's plausible range."""


@dataclass
class Row:
    """What there is to say of a member (see `SCHEMA`), of a grid (``member`` empty) or of a shard (both empty).
    ``faults``, ``notes``: reason -> detail."""

    shard: str
    grid: str = ""
    member: str = ""
    sensor: str = ""
    faults: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    shape: tuple[int, ...] = ()
    finite: float | None = None
    low: float | None = None
    high: float | None = None
    outside: float | None = None

    @property
    def ok(self) -> bool:
        return not self.faults

    def fault(self, reason: str, detail: str = "") -> None:
        self.faults.setdefault(reason, detail)

    def note(self, reason: str, detail: str = "") -> None:
        self.notes.setdefault(reason, detail)


def to_table(rows: Iterable[Row]) -> pa.Table:
    """Rows with the columns of `SCHEMA`."""
    listed = [
        {
            "shard": r.shard, "grid": r.grid, "member": r.member, "sensor": r.sensor, "ok": r.ok,
            "faults": _said(r.faults), "notes": _said(r.notes), "dtype": r.dtype, "shape": r.shape,
            "finite": r.finite, "min": r.low, "max": r.high, "outside": r.outside,
        }
        for r in rows
    ]  # fmt: skip
    return pa.Table.from_pylist(listed, schema=SCHEMA)


def _said(reasons: dict[str, str]) -> list[dict[str, str]]:
    return [{"reason": reason, "detail": detail} for reason, detail in reasons.items()]


def verify_shard(uri: str, today: datetime.date | None = None) -> list[Row]:
    """Read all of a shard, one member at a time, and compare it with what it should be.

    Args:
        today: the last day of which an image can be; in UTC, now, where not given.

    Raises:
        OSError: it cannot be read, or it changed meanwhile.
    """
    today = today or datetime.datetime.now(datetime.timezone.utc).date()
    survey = survey_shard(uri)
    file = open_file(uri)
    rows: dict[str, Row] = {}
    grids: dict[str, dict[str, Member]] = {}
    for item in walk(Windows(file.read, survey.stamp.size).read, survey.stamp.size, uri):
        if isinstance(item, Member):
            name = f"{item.key}.{item.extension}"
            rows[name] = Row(uri, item.key, name, _sensor(item.extension))
            grids.setdefault(item.key, {})[item.extension] = item
    for problem in [*survey.problems, *(p for grid in survey.grids for p in grid.problems)]:
        name = problem.where.removeprefix(uri).removeprefix(":")
        if name not in rows:
            key = name.partition(".")[0]
            rows[name] = Row(uri, key if key in grids else "", name if name not in grids else "")
        rows[name].fault(problem.reason, problem.detail)
    for key, members in grids.items():
        _check_grid(file, key, members, rows, today)
    if file.stamp() != survey.stamp:
        raise OSError(f"{uri} changed while it was read; do it again when it is whole")
    return list(rows.values())


def duplicates(grids: Iterable[str], shard: str, first: dict[str, str]) -> list[Row]:
    """A row for each grid of ``shard`` that a shard before had. ``first``: grid -> that shard; it is added to."""
    found = []
    for grid in dict.fromkeys(grids):
        other = first.setdefault(grid, shard)
        if other != shard:
            found.append(Row(shard, grid, faults={"duplicate_grid": f"in {other} too, from which it is taken"}))
    return found


def _sensor(extension: str) -> str:
    sensor = extension.removesuffix(".pth")
    return sensor if sensor in SENSORS and extension.endswith(".pth") else ""


def _check_grid(file: File, key: str, members: dict[str, Member], rows: dict[str, Row], today: datetime.date) -> None:
    anchor = rows[f"{key}.{next(iter(members))}"]
    if grid_number(key) is None:
        anchor.fault("wrong_grid", f"its key {key[:80]!r} is no grid's number of seven digits")
    shapes: dict[str, tuple[int, ...]] = {}
    for extension, member in members.items():
        row = rows[f"{key}.{extension}"]
        if row.sensor:
            _check_tensor(file, member, row)
            if row.shape and "wrong_shape" not in row.faults:
                shapes[row.sensor] = row.shape
        elif extension != "json":
            row.note("unknown_member", "neither a sensor's .pth nor the names' .json: nothing reads it")
    patches = {s: shapes[s][0] for s in ("s1_grd", "s2_toa") if s in shapes}
    if len(set(patches.values())) > 1:
        said = ", ".join(f"{number} of {sensor}" for sensor, number in patches.items())
        rows[f"{key}.s2_toa.pth"].note("patch_counts", f"patches: {said}")
    names = _names(file, members.get("json"), rows.get(f"{key}.json"))
    if names is None:
        return
    for sensor in SENSORS:
        name = f"{key}.{sensor}.pth"
        if f"{sensor}.pth" not in members:
            if names.get(sensor):
                row = rows.setdefault(name, Row(anchor.shard, key, name, sensor))
                row.fault("missing_member", "its images are named in the JSON, but it is not there")
        elif not names.get(sensor):
            rows[name].fault("missing_names", "the JSON does not name its images")
        elif sensor in shapes:
            row = rows[name]
            leading = shapes[sensor][: len(LEADING_AXES[sensor])]
            check_names(names[sensor], sensor, key, leading, today, row.fault, row.note)


def _names(file: File, member: Member | None, row: Row | None) -> dict[str, Any] | None:
    """What the JSON says; None where there is none that can be read (`survey` has named why)."""
    if member is None or row is None or row.faults.keys() & {"bad_json"} or member.size > MAX_JSON_BYTES:
        return None
    names = json.loads(file.read(member.offset, member.size))
    return names if isinstance(names, dict) else None


def _check_tensor(file: File, member: Member, row: Row) -> None:
    try:
        array = read_tensor(file.read, member.offset, member.size)
    except PthError as error:
        return row.fault(error.reason, str(error))
    except OSError as error:
        file.stamp()  # raises where the whole shard is gone: then there is no use in asking for every other member
        return row.fault("unreadable", str(error))
    row.dtype, row.shape = array.dtype.name, array.shape
    if "wrong_shape" not in row.faults:
        _check_values(array, row)
    return None


def _check_values(array: np.ndarray, row: Row) -> None:
    sensor, expected = SENSORS[row.sensor], PLAUSIBLE[row.sensor]
    if array.dtype != STORED_DTYPE[row.sensor]:
        row.fault("wrong_dtype", f"{array.dtype}, published is {STORED_DTYPE[row.sensor]}")
    _note_size(array.shape, row)
    found = measure(array, sensor)
    row.finite, row.low, row.high, row.outside = found.finite, found.low, found.high, found.outside
    if found.low is None or found.high is None:
        return row.fault("all_nan", "no finite value")
    if found.finite < LOW_FINITE:
        row.note("low_finite", f"{found.finite:.1%} of the values are finite")
    if found.empty:
        row.note("empty_images", f"{found.empty} of {found.images} images hold no finite value")
    bounds = f"{expected.low:g}..{expected.high:g} {sensor.units}"
    if found.impossible is not None:
        row.fault("out_of_range", f"{found.impossible:g} {sensor.units} is no measurement ({bounds})")
    elif found.outside > MANY_OUTSIDE:
        row.fault("out_of_range", f"{found.outside:.1%} of the values are outside {bounds}")
    elif found.outside:
        row.note("few_out_of_range", f"{found.outside:.2g} of the values are outside {bounds}")
    constant = found.constant_C
    if constant.all():
        said = f"all values are {found.low:g}" if found.low == found.high else "each band is one number"
        return row.note("flat", said) if row.sensor == "dem" else row.fault("constant", said)
    if constant.any():
        bands = [band for band, c in zip(sensor.bands, constant, strict=True) if c]
        row.note("constant_bands", f"one number only in {', '.join(bands)}")
    if found.blank:
        row.note("constant_images", f"{found.blank} of {found.images} images are one number a band")
    if row.sensor == "s1_grd" and found.low >= 0:
        row.fault("wrong_unit", f"no value is below 0 ({found.low:g}..{found.high:g}): power, not dB?")
    if row.sensor == "s2_toa" and found.high < DARK:
        row.fault("wrong_unit", f"no value reaches {DARK} ({found.low:g}..{found.high:g}): not reflectance x 10000?")
    return None


def _note_size(shape: tuple[int, ...], row: Row) -> None:
    side, dates = SENSORS[row.sensor].stored_size, published_dates(row.sensor)
    leading = LEADING_AXES[row.sensor]
    found = [f"{shape[-2]} x {shape[-1]} pixels"] + ([f"{shape[len(leading) - 1]} dates"] if leading else [])
    published = [f"{side} x {side} pixels"] + ([f"{dates} dates"] if leading else [])
    if found != published:
        row.note("other_size", f"{', '.join(found)}; published are {', '.join(published)}")
