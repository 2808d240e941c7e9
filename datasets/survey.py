"""What one shard holds, found by a few ranged reads of its headers: where each sensor's numbers lie, dates and places.

Payloads are not read, and nothing in a pickle is run. Whatever cannot be used is named as a `Problem`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from copernicus.datasets.pth import PthError, TensorAt, locate_tensor
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import LEADING_AXES, Problem, grid_center, parse_image_name
from copernicus.datasets.storage import Stamp, open_file
from copernicus.datasets.stores import split_options
from copernicus.datasets.tar import Member, Windows, walk

MAX_JSON_BYTES = 1 << 20
"""A grid's names take about 6 kB; a stranger's JSON may not fill the memory."""


@dataclass(frozen=True)
class SensorAt:
    """Where a sensor's array of one grid lies, and what its images are.

    ``offset``: byte of the first number in the shard. ``member``, ``size``: the whole .pth member, bytes. ``whole``: why
    slices of it cannot be read ("compressed", "not contiguous"), else "". ``days``: since 1970-01-01 of each image,
    nested axes flattened, None where its name does not say; ``lon``, ``lat`` (degrees) and ``local`` (id) of each local
    patch, empty for sensors without. ``files``: in the raw layout, the file of each image, like ``days``.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    member: int
    size: int
    whole: str = ""
    days: tuple[int | None, ...] = ()
    lon: tuple[float | None, ...] = ()
    lat: tuple[float | None, ...] = ()
    local: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


@dataclass
class GridSurvey:
    """One grid: its place (degrees), the sensors that can be used and what could not be."""

    key: str
    lon: float | None = None
    lat: float | None = None
    sensors: dict[str, SensorAt] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass
class ShardSurvey:
    """One shard: ``digest`` is of what it holds, the same wherever a copy lies. ``problems``: those of no single grid."""

    uri: str
    stamp: Stamp
    grids: list[GridSurvey]
    problems: list[Problem]

    @property
    def digest(self) -> str:
        content = [
            [
                g.key,
                [[name, at.dtype, at.shape, at.offset, at.days, at.files] for name, at in sorted(g.sensors.items())],
            ]
            for g in self.grids
        ]
        return hashlib.sha256(
            json.dumps([split_options(self.uri)[0].rsplit("/", 1)[-1], content]).encode()
        ).hexdigest()[:16]


def survey_shard(uri: str) -> ShardSurvey:
    """Read the headers of a shard.

    Raises:
        OSError: it cannot be read, or it changed meanwhile.
    """
    file = open_file(uri)
    stamp = file.stamp()
    windows = Windows(file.read, stamp.size)
    found: dict[str, GridSurvey] = {}
    names: dict[str, bytes] = {}
    problems: list[Problem] = []
    for item in walk(windows.read, stamp.size, uri):
        if isinstance(item, Problem):
            # A fault that names a member counts for that grid alone.
            grid = found.get(_key(item.where, uri))
            (problems if grid is None else grid.problems).append(item)
            continue
        grid = found.setdefault(item.key, GridSurvey(item.key))
        if item.extension == "json":
            if item.size > MAX_JSON_BYTES:
                grid.problems.append(Problem(f"{uri}:{item.key}.json", "bad_json", f"{item.size} bytes are no names"))
                names[item.key] = b""
            else:
                names[item.key] = windows.read(item.offset, item.size)
            continue
        sensor = item.extension.removesuffix(".pth")
        if sensor in SENSORS and item.extension.endswith(".pth"):
            _locate(windows, item, sensor, uri, grid)
    for key, grid in found.items():
        _name(grid, names.get(key), uri)
    if file.stamp() != stamp:
        raise OSError(f"{uri} changed while its headers were read; do it again when it is whole")
    return ShardSurvey(uri, stamp, list(found.values()), problems)


def _key(where: str, uri: str) -> str:
    return where.removeprefix(f"{uri}:").split(".", 1)[0]


def _locate(windows: Windows, member: Member, sensor: str, uri: str, grid: GridSurvey) -> None:
    where = f"{uri}:{member.key}.{member.extension}"
    try:
        at = locate_tensor(windows.read, member.offset, member.size)
        check_axes(at, sensor)
    except PthError as error:
        grid.problems.append(Problem(where, error.reason, str(error)))
        return
    grid.sensors[sensor] = SensorAt(at.dtype.name, at.shape, at.offset, member.offset, member.size, at.whole)


def check_axes(at: TensorAt, sensor: str) -> None:
    """Raises PthError unless the axes are the published ones of this sensor (sizes are free)."""
    channels = SENSORS[sensor].channels
    expected = len(LEADING_AXES[sensor]) + (2 if sensor == "dem" else 3)
    channels_fit = sensor == "dem" or (len(at.shape) == expected and at.shape[-3] == channels)
    if len(at.shape) != expected or not channels_fit or 0 in at.shape:
        raise PthError(f"shape {at.shape}, expected {expected} axes, {channels} channels", reason="wrong_shape")


def _name(grid: GridSurvey, data: bytes | None, uri: str) -> None:
    """Adds what the JSON says; a grid whose JSON cannot be read keeps no sensor."""
    if data is None:
        grid.sensors.clear()
        grid.problems.append(Problem(f"{uri}:{grid.key}", "missing_json"))
        return
    try:
        names = json.loads(data)
        if not isinstance(names, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        grid.sensors.clear()
        if not any(p.reason == "bad_json" for p in grid.problems):
            grid.problems.append(Problem(f"{uri}:{grid.key}.json", "bad_json", str(error)[:200]))
        return
    if grid.key.isdecimal():
        try:
            grid.lon, grid.lat = grid_center(int(grid.key))
        except InputError as error:
            grid.problems.append(Problem(f"{uri}:{grid.key}.json", "bad_json", str(error)))
    for sensor, at in list(grid.sensors.items()):
        try:
            grid.sensors[sensor] = _described(at, sensor, names, grid)
        except InputError as error:
            del grid.sensors[sensor]
            grid.problems.append(Problem(f"{uri}:{grid.key}.{sensor}.pth", "bad_json", str(error)))
    if grid.sensors and grid.lon is None:
        grid.sensors.clear()
        detail = f"no image name gives a place, and the key {grid.key!r} is no grid number"
        grid.problems.append(Problem(f"{uri}:{grid.key}.json", "bad_json", detail))


def _described(at: SensorAt, sensor: str, names: Mapping[str, Any], grid: GridSurvey) -> SensorAt:
    """With the dates and places that the image names give."""
    leading = at.shape[: len(LEADING_AXES[sensor])]
    nested = names.get(sensor)
    images = [parse_image_name(name) if name is not None else None for name in _flat(nested, leading)]
    days = tuple(None if i is None or i.days != i.days else int(i.days) for i in images)
    if len(leading) == 2:
        lon: list[float | None] = []
        lat: list[float | None] = []
        local: list[str] = []
        for patch in range(leading[0]):
            here = [i for i in images[patch * leading[1] : (patch + 1) * leading[1]] if i is not None]
            if len({(i.lon, i.lat) for i in here}) > 1:
                raise InputError(f"the images of patch {patch} name different places")
            lon.append(here[0].lon if here else None)
            lat.append(here[0].lat if here else None)
            local.append(here[0].local if here else "")
        return dataclasses.replace(at, days=days, lon=tuple(lon), lat=tuple(lat), local=tuple(local))
    if grid.lon is None and (first := next((i for i in images if i is not None), None)) is not None:
        grid.lon, grid.lat = first.lon, first.lat
    return dataclasses.replace(at, days=days if sensor != "dem" else ())


def _flat(names: Any, leading: Sequence[int]) -> list[Any]:
    """The name of each image in the order of the array's leading axes; None where the JSON does not say."""
    if not leading:
        while isinstance(names, list) and len(names) == 1:  # published strings come wrapped in one-element lists
            names = names[0]
        return [names if isinstance(names, str) else None]
    inner = [names[i] if isinstance(names, list) and i < len(names) else None for i in range(leading[0])]
    return [name for part in inner for name in _flat(part, leading[1:])]
