"""Copernicus-Pretrain on disk: the published WebDataset shards, their names and writing them.

One grid cell (0.25 x 0.25 degrees, nodes of the ERA5 grid) is one sample: its tar members share the key ``<gridId>``.

    <gridId>.s1_grd.pth   float32 (patch, date, 2, H, W)       dB
    <gridId>.s2_toa.pth   int16   (patch, date, 13, H, W)      reflectance x 10000
    <gridId>.s3_olci.pth  float32 (date, 21, H, W)             radiance
    <gridId>.s5p_*.pth    float32 (date, 1, H, W)              mol m-2
    <gridId>.dem.pth      float32 (H, W)                       metres
    <gridId>.json         per sensor, the names of the images, nested like the array's leading axes

Image names are ``<grid>/<patch>/<YYYYMMDD>`` (s1, s2), ``<grid>/<YYYYMMDD>`` (s3, s5p) and ``<grid>`` (dem), where grid
and patch are ``<id>_<lon>_<lat>``; in the JSON each is wrapped in a list of its own. A sensor that a grid lacks has no
member.

Source: Copernicus-FM (arXiv 2503.11849) and the data set's published loader.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from copernicus.datasets.sensors import SENSORS, InputError

GRID_DEGREES = 0.25
GRID_COLUMNS = 1440
GRID_ROWS = 721
LEADING_AXES: dict[str, tuple[str, ...]] = {
    name: ("patch", "date") if name in ("s1_grd", "s2_toa") else () if name == "dem" else ("date",) for name in SENSORS
}
"""The axes of a sensor's stored array in front of (band, H, W); the DEM, alone, is stored without a band axis."""

STORED_DTYPE: dict[str, np.dtype] = {name: np.dtype("int16" if name == "s2_toa" else "float32") for name in SENSORS}
_EPOCH = datetime.date(1970, 1, 1)


class ImageName(NamedTuple):
    """What the name of an image says: ``lon`` and ``lat`` of the patch where there is one, else of the grid (degrees);
    ``days`` since 1970-01-01, NaN where the name carries no date; ``local``: the patch's id, where there is one."""

    grid: str
    lon: float
    lat: float
    days: float
    local: str = ""


@dataclass(frozen=True)
class Problem:
    """Something in the data that could not be used."""

    where: str  # shard and member, or a raw image
    # truncated_tar, damaged_tar, stray_member, duplicate_member, duplicate_grid; missing_json, bad_json; unreadable,
    # changed, unsafe_or_broken_pth, wrong_shape, all_nan; of raw images also scaled, no_date, too_many_dates
    reason: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class Grid:
    """One sample: ``arrays`` by sensor as they are stored, ``images`` by sensor their names (see the table above)."""

    key: str
    arrays: dict[str, np.ndarray]
    images: dict[str, list]


def grid_index(lon: float, lat: float) -> int:
    """The number of the grid node nearest to a place: row from the South Pole x 1440 + column from 180 degrees west."""
    row = round((lat + 90) / GRID_DEGREES)
    column = round((lon + 180) / GRID_DEGREES) % GRID_COLUMNS
    if not 0 <= row < GRID_ROWS:
        raise InputError(f"latitude {lat} is outside -90..90 degrees")
    return row * GRID_COLUMNS + column


def grid_center(index: int) -> tuple[float, float]:
    """(lon, lat) of a grid node, degrees."""
    row, column = divmod(index, GRID_COLUMNS)
    if not 0 <= row < GRID_ROWS:
        raise InputError(f"no grid {index}; grids are numbered 0 to {GRID_ROWS * GRID_COLUMNS - 1}")
    return column * GRID_DEGREES - 180, row * GRID_DEGREES - 90


def grid_key(index: int) -> str:
    """The seven digits that a grid's members share, such as ``0200599``."""
    return f"{index:07d}"


def grid_name(index: int) -> str:
    """A grid's key with its coordinates, such as ``0200599_-70.25_-55.25``."""
    lon, lat = grid_center(index)
    return f"{grid_key(index)}_{lon:.2f}_{lat:.2f}"


def patch_name(local_id: int, lon: float, lat: float) -> str:
    """The name of a local patch, as it stands between grid and date in the names of s1 and s2 images."""
    return f"{local_id}_{lon:.4f}_{lat:.4f}"


def days_since_1970(date: str) -> float:
    """``YYYYMMDD`` -> days since 1970-01-01.

    Raises:
        InputError: it is not a date.
    """
    try:
        return float((datetime.datetime.strptime(date, "%Y%m%d").date() - _EPOCH).days)
    except ValueError:
        raise InputError(f"{date!r} is not a date; expected YYYYMMDD") from None


def date_string(days: int) -> str:
    """Days since 1970-01-01 -> ``YYYYMMDD``."""
    return (_EPOCH + datetime.timedelta(days=int(days))).strftime("%Y%m%d")


def parse_image_name(name: str | Sequence) -> ImageName:
    """Reads an image's name, bare or wrapped in lists of one element.

    Raises:
        InputError: the name has another form.
    """
    bare: Any = name
    while not isinstance(bare, str):
        if not isinstance(bare, (list, tuple)) or len(bare) != 1:
            raise InputError(f"image name {name!r} is neither a string nor a list of one string")
        bare = bare[0]
    parts = bare.split("/")
    days = float("nan")
    if len(parts) > 1 and re.fullmatch(r"\d{8}", parts[-1]):
        days = days_since_1970(parts.pop())
    place = re.fullmatch(r"[^_]+_(-?\d+(?:\.\d*)?)_(-?\d+(?:\.\d*)?)", parts[-1])
    if place is None or len(parts) > 2:
        raise InputError(
            f"image name {bare!r} is not <grid>[/<patch>][/<YYYYMMDD>] with <id>_<lon>_<lat> for grid and patch"
        )
    local = parts[1].split("_", 1)[0] if len(parts) == 2 else ""
    return ImageName(parts[0], float(place[1]), float(place[2]), days, local)


def check_grid(grid: Grid) -> None:
    """Raises InputError unless keys, axes, dtypes and the nesting of the names are as published (sizes are free)."""
    where = f"grid {grid.key!r}"
    if not re.fullmatch(r"\d{7}", grid.key):
        raise InputError(f"{where}: a grid's key is seven digits")
    if set(grid.arrays) != set(grid.images):
        raise InputError(f"{where}: arrays of {sorted(grid.arrays)} but image names of {sorted(grid.images)}")
    for sensor, array in grid.arrays.items():
        if sensor not in SENSORS:
            raise InputError(f"{where}: no sensor {sensor!r}; the sensors are {', '.join(SENSORS)}")
        leading = LEADING_AXES[sensor]
        band = () if sensor == "dem" else (SENSORS[sensor].channels,)
        axes = f"({', '.join((*leading, *map(str, band), 'H', 'W'))}) {STORED_DTYPE[sensor]}"
        shape = array.shape
        if len(shape) != len(leading) + len(band) + 2 or shape[len(leading) : -2] != band or 0 in shape:
            raise InputError(f"{where}: {sensor} has shape {shape}; expected {axes}")
        if array.dtype != STORED_DTYPE[sensor]:
            raise InputError(f"{where}: {sensor} is {array.dtype}; expected {axes}")
        _check_names(grid.images[sensor], shape[: len(leading)] or (1,), f"{where}: {sensor}")


def _check_names(names: Any, shape: tuple[int, ...], where: str) -> None:
    if not shape:
        parse_image_name(names)
        return
    if isinstance(names, str) or len(names) != shape[0]:
        raise InputError(f"{where}: the image names do not nest like the array's leading axes")
    for inner in names:
        _check_names(inner, shape[1:], where)


def _wrapped(names: Any) -> list:
    """Each string in a list of its own, as the published writer leaves them."""
    return [names] if isinstance(names, str) else [_wrapped(inner) for inner in names]


def _pth(array: np.ndarray) -> bytes:
    """A tensor as torch.save writes it: a zip of stored members, the raw numbers contiguous at one offset."""
    import torch

    buffer = io.BytesIO()
    torch.save(torch.from_numpy(np.array(array, order="C")), buffer)  # a copy, so that no view drags its base along
    return buffer.getvalue()


def write_shard(grids: Iterable[Grid], path: Path) -> int:
    """Writes one tar and returns how many grids it holds. The same grids give the same bytes. The file appears under
    its name only when it is whole.

    Raises:
        InputError: a grid is not as published (see `check_grid`), or two share a key.
    """
    import webdataset

    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    seen: set[str] = set()
    try:
        with open(part, "wb") as file:
            with webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False) as tar:
                for grid in grids:
                    check_grid(grid)
                    if grid.key in seen:
                        raise InputError(f"{path.name}: two grids have the key {grid.key}")
                    seen.add(grid.key)
                    sample: dict[str, Any] = {"__key__": grid.key}
                    sample |= {f"{sensor}.pth": _pth(array) for sensor, array in grid.arrays.items()}
                    names = {s: _wrapped(grid.images[s]) for s in SENSORS if s in grid.images}
                    sample["json"] = json.dumps(names).encode()
                    tar.write(sample)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return len(seen)


def shard_path(folder: Path, number: int) -> Path:
    """``example-000000.tar`` and so on."""
    return folder / f"example-{number:06d}.tar"


def write_shards(
    grids: Iterable[Grid],
    folder: Path | str,
    grids_per_shard: int = 100,
    progress: Callable[[int], None] | None = None,
) -> list[Path]:
    """Writes ``example-000000.tar``, ... into a folder (made if missing), grids in the order they come.

    Args:
        progress: called after each shard with the number of grids written so far.

    Raises:
        InputError: a grid is not as published, or grids_per_shard is below 1.
    """
    if grids_per_shard < 1:
        raise InputError(f"grids_per_shard is {grids_per_shard}; it must be at least 1")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    written = 0
    for chunk in _chunks(iter(grids), grids_per_shard):
        path = shard_path(folder, len(paths))
        written += write_shard(chunk, path)
        paths.append(path)
        if progress:
            progress(written)
    return paths


def _chunks(grids: Iterator[Grid], size: int) -> Iterator[Iterator[Grid]]:
    """Lazily, so that one grid at a time is in memory. Each chunk must be used up before the next is asked for."""
    for first in grids:
        yield _chain(first, islice(grids, size - 1))


def _chain(first: Grid, rest: Iterator[Grid]) -> Iterator[Grid]:
    yield first
    yield from rest
