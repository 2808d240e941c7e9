"""The raw layout of Copernicus-Pretrain: GeoTIFFs in folders, and a file that lists them by grid.

    s1_grd_utm/images/<grid>/<patch>/<name with YYYYMMDDThhmmss>.tif       s2_toa_mix/... alike
    s3_olci_wgs/images/<grid>/<name with YYYYMMDDThhmmss>.tif
    s5p_l3_wgs/images/<gas>_column_number_density/<grid>/<YYYY-MM-DD>_<YYYY-MM-DD>.tif
    dem_grid_wgs/images/<grid>/dem.tif
    fnames*.json.gz   {"<grid's number>": {"grid_id_coord": <grid>, "s1_grd": {<patch>: [path, ...]}, "s2_toa": {...},
                       "s3_olci": [path, ...], "s5p_co": [...], ..., "dem": [path]}}

Grid and patch are ``<id>_<lon>_<lat>``, paths are relative to the layout's folder; only what the file lists counts, so
the folders may have other names. The published lists call Sentinel-3's folder ``s3_olci_utm``, but its images lie in
``s3_olci_wgs``. A grid may lack sensors, a patch dates.

Source: the data set's published writer and loader (folder Copernicus-Pretrain of Copernicus-FM, arXiv 2503.11849).
Legend of shapes: C bands, H rows, W columns.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import rasterio.errors
from rasterio.windows import Window

from copernicus.datasets import baseline
from copernicus.datasets.geotiff import file_driver
from copernicus.datasets.json_stream import read_entries
from copernicus.datasets.sensors import SENSORS, InputError, get_sensor
from copernicus.datasets.shards import LEADING_AXES, STORED_DTYPE, Grid, Problem, days_since_1970, parse_image_name
from copernicus.datasets.stored import as_stored, fill_dates, published_dates, to_type

_LOCAL = tuple(sensor for sensor, axes in LEADING_AXES.items() if "patch" in axes)  # s1_grd, s2_toa
_LON_LAT = r"_-?\d{1,3}(?:\.\d{0,9})?_-?\d{1,2}(?:\.\d{0,9})?"
GRID_NAME = re.compile(r"\d{7}" + _LON_LAT, re.ASCII)
PATCH_NAME = re.compile(r"\d{1,12}" + _LON_LAT, re.ASCII)
_NOT_THERE = (None, errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG)  # None: GDAL's
_LARGEST_SIDE = 4096  # pixels; published images have up to about 1000


class RawImage(NamedTuple):
    """One image file. ``path``: relative to the layout's folder; ``name``: as a shard's JSON has it; ``patch``: the
    local patch ("" where the sensor has none); lon, lat: of the patch or the grid, degrees; ``days`` since 1970-01-01,
    NaN where the file's name has no date."""

    path: str
    name: str
    patch: str
    lon: float
    lat: float
    days: float


@dataclass(frozen=True)
class RawGrid:
    """``images``: sensor -> [patch][date]; one patch where the sensor has no local patches. Patches that s1 and s2 both
    have come first, in the same order in both."""

    key: str
    name: str
    images: dict[str, tuple[tuple[RawImage, ...], ...]]


@dataclass(frozen=True)
class RawLayout:
    """The grids that have an image. A full list is 2 GB of text, so a grid's entry stays compressed until it is asked
    for; the whole travels to workers by pickling. ``empty``: grids listed without any image."""

    folder: Path
    source: str  # what listed the images, for messages
    entries: Mapping[str, bytes] = field(repr=False)
    digest: str = ""  # of the list: the same images give the same value
    empty: int = 0

    @property
    def keys(self) -> tuple[str, ...]:
        """Seven-digit keys of the grids, in the list's order."""
        return tuple(self.entries)

    def grid(self, key: str) -> RawGrid:
        """What there is of a grid (by the list; files are not looked at)."""
        entry = json.loads(zlib.decompress(self.entries[key]))
        name = entry["grid_id_coord"]
        images: dict[str, tuple[tuple[RawImage, ...], ...]] = {}
        patches = {s: [p for p, paths in (entry.get(s) or {}).items() if paths] for s in _LOCAL}
        for sensor, order in zip(_LOCAL, pair(*patches.values()), strict=True):
            if order:
                images[sensor] = tuple(
                    tuple(_image(p, sensor, name, patch) for p in entry[sensor][patch]) for patch in order
                )
        for sensor in SENSORS:
            if sensor not in _LOCAL and entry.get(sensor):
                images[sensor] = (tuple(_image(path, sensor, name, "") for path in entry[sensor]),)
        return RawGrid(key, name, {sensor: images[sensor] for sensor in SENSORS if sensor in images})

    def locate(self, image: RawImage) -> Path:
        """Where an image's file lies."""
        if "s3_olci_utm" in image.path:
            moved = self.folder / image.path.replace("s3_olci_utm", "s3_olci_wgs")
            if moved.is_file():
                return moved
        return self.folder / image.path

    def part(self, keys: Iterable[str]) -> RawLayout:
        """The layout of these grids alone."""
        return RawLayout(self.folder, self.source, {key: self.entries[key] for key in keys})


def pair(first: Sequence[str], second: Sequence[str]) -> tuple[list[str], list[str]]:
    """The patches of two sensors, those that both have first and in one order."""
    both = [patch for patch in first if patch in second]
    return tuple(both + [patch for patch in patches if patch not in both] for patches in (first, second))  # type: ignore[return-value]


def _image(path: str, sensor: str, grid: str, patch: str) -> RawImage:
    file = path.rpartition("/")[2]
    found = re.search(r"\d{4}-\d{2}-\d{2}" if sensor.startswith("s5p") else r"\d{8}(?=T)", file)
    name = f"{grid}/{patch}" if patch else grid
    if found and sensor != "dem":
        date = found[0].replace("-", "")
        try:
            days_since_1970(date)
            name = f"{name}/{date}"
        except InputError:  # digits that are no date
            pass
    place = parse_image_name(name)
    return RawImage(path, name, patch, place.lon, place.lat, place.days)


def read_layout(folder: Path | str, fnames: Path | str | None = None) -> RawLayout:
    """Reads a raw layout's list of images.

    Args:
        fnames: the list; where not given, the one ``fnames*.json.gz`` in the folder.

    Raises:
        InputError: no such folder or list, several lists to choose from, a list that cannot be read or is no list, or
            one without an image.
    """
    folder = Path(folder).absolute()  # workers may run in another directory
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if fnames is None:
        lists = sorted(folder.glob("fnames*.json.gz"))
        if not lists:
            raise InputError(f"{folder}: no fnames*.json.gz, which lists a raw layout's images; name it with --fnames")
        if len(lists) > 1:
            raise InputError(f"{folder}: several lists; choose one with --fnames: {', '.join(map(str, lists))}")
        fnames = lists[0]
    fnames = Path(fnames)
    entries: dict[str, bytes] = {}
    digest = hashlib.sha256()
    empty = 0
    for number, entry, text in read_entries(fnames):
        where = f"{fnames}: grid {number!r}"
        if not isinstance(entry, dict) or not isinstance(entry.get("grid_id_coord"), str):
            raise InputError(f"{where} is not an object with grid_id_coord; is this the list of a raw layout?")
        name = entry["grid_id_coord"]
        if not GRID_NAME.fullmatch(name) or not number.isdecimal() or int(number) != int(name[:7]):
            raise InputError(f"{where}: grid_id_coord {name!r} is not its seven digits, longitude and latitude")
        key = name[:7]
        if key in entries:
            raise InputError(f"{where} is there twice")
        if not _check_entry(entry, where):
            empty += 1
            continue
        entries[key] = zlib.compress(text.encode(), 1)
        digest.update(text.encode())
    if not entries:
        raise InputError(f"{fnames}: none of its {empty} grids has an image")
    return RawLayout(folder, fnames.name, entries, digest.hexdigest(), empty)


def _check_entry(entry: dict[str, Any], where: str) -> int:
    """The number of images that an entry lists; InputError where it is not as published."""
    count = 0
    for sensor in SENSORS:
        local = sensor in _LOCAL
        listed = entry.get(sensor) or ({} if local else [])
        if not isinstance(listed, dict if local else list):
            raise InputError(f"{where}: {sensor} is not {'an object of patches' if local else 'a list of paths'}")
        for patch, paths in listed.items() if isinstance(listed, dict) else [("", listed)]:
            if local and not PATCH_NAME.fullmatch(patch):
                raise InputError(f"{where}: patch {patch!r} of {sensor} is not <id>_<lon>_<lat>")
            if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
                raise InputError(f"{where}: {sensor} {patch} is not a list of paths")
            for path in paths:
                if path.startswith("/") or "\\" in path or ".." in path.split("/"):
                    raise InputError(f"{where}: {path!r} leads out of the folder; paths are relative to it")
            count += len(paths)
    return count


class ImageError(Exception):
    """An image that cannot be used; ``reason`` is its short name, as in `Problem`."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def read_image(
    path: Path | str,
    sensor: str,
    size: int,
    s2_offset: str = "auto",
    rows: tuple[int, int] | None = None,
    notes: Counter[str] | None = None,
) -> np.ndarray:
    """One GeoTIFF as a shard stores it: (C, size, size), or (C, stop - start, size) of ``rows``, of the stored type.

    Nodata and infinite values become NaN (0 in Sentinel-2), then see `as_stored`. Numbers are taken as they are; only
    the radiometric offset of Sentinel-2 is taken off, by ``s2_offset`` (see `baseline`). Where the file's shorter side
    is ``size`` already, no more than the pixels asked for are read.

    Args:
        size: stored side, pixels.
        rows: (start, stop) of the stored image's rows; these may be without a valid value.
        notes: counts the images read, by sensor, and those of unknown offset, as `baseline.UNKNOWN`.

    Raises:
        ImageError: unreadable, wrong_shape (bands, sides), scaled (GDAL scale or offset, which the raw layout does not
            use), all_nan (not one valid value).
        OSError: the storage failed, which says nothing about the image.
    """
    start, stop = rows or (0, size)
    assert 0 <= start < stop <= size, rows
    path, spec = Path(path), get_sensor(sensor)
    try:
        with warnings.catch_warnings(), rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            if (driver := file_driver(path)) != "GTiff":
                raise ImageError("unreadable", f"it is {driver}, not GeoTIFF")
            with rasterio.open(path, driver=driver) as source:
                height, width = source.shape
                if source.count != spec.channels or max(height, width) > _LARGEST_SIDE:
                    shape = f"{source.count} x {height} x {width}"
                    raise ImageError(
                        "wrong_shape", f"{shape}; expected {spec.channels} bands of at most {_LARGEST_SIDE}"
                    )
                if any(s != 1 for s in source.scales) or any(o != 0 for o in source.offsets):
                    raise ImageError("scaled", "its bands carry a scale or an offset; store plain numbers")
                fits = min(height, width) == size
                window = None
                if fits:
                    window = Window((width - size) // 2, (height - size) // 2 + start, size, stop - start)
                values = source.read(window=window, masked=True)
                tags = source.tags() if sensor == "s2_toa" else {}
    except (OSError, InputError, rasterio.errors.RasterioError) as error:
        if isinstance(error, OSError) and error.errno not in _NOT_THERE:
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ImageError("unreadable", reason.removeprefix(f"{path}: ").replace(str(path), path.name)) from None
    x_CHW = values.astype(np.float32).filled(np.nan)
    x_CHW = np.where(np.isfinite(x_CHW), x_CHW, np.float32(np.nan))
    if stop - start == size and np.isnan(x_CHW).all():
        raise ImageError("all_nan", "nodata or NaN in all its pixels")
    if sensor == "s2_toa":
        offset = baseline.offset_for(s2_offset, path.name, tags)
        if offset is None and notes is not None:
            notes[baseline.UNKNOWN] += 1
        x_CHW = baseline.add_offset(x_CHW, offset or 0)
    if notes is not None:
        notes[sensor] += 1
    return to_type(x_CHW, STORED_DTYPE[sensor]) if fits else as_stored(x_CHW, sensor, size)[:, start:stop]


def load_grid(
    layout: RawLayout,
    key: str,
    sizes: Mapping[str, int] | None = None,
    s2_offset: str = "auto",
    seed: int = 0,
    notes: Counter[str] | None = None,
) -> tuple[Grid, list[Problem]]:
    """A grid in the form in which a shard stores it, from what can be read of it.

    An image that cannot be used is left out and named in the problems; so are dates beyond the published number. Of
    what remains, fewer dates than published are filled by repeating some (`fill_dates`). Patches of which s1 and s2
    can both be read come first in both. An image without a date in its name is kept and named ("no_date").

    Args:
        sizes: sensor -> stored side; the published one where not given.
        notes: see `read_image`.
    """
    raw, problems = layout.grid(key), list[Problem]()
    read: dict[str, dict[str, tuple[np.ndarray, list[str]]]] = {}
    for sensor, patches in raw.images.items():
        size = (sizes or {}).get(sensor, SENSORS[sensor].stored_size)
        for images in patches:
            problems += [Problem(i.path, "too_many_dates", "left out") for i in images[published_dates(sensor) :]]
            arrays, names = [], []
            for image in images[: published_dates(sensor)]:
                try:
                    arrays.append(read_image(layout.locate(image), sensor, size, s2_offset, notes=notes))
                except ImageError as error:
                    problems.append(Problem(image.path, error.reason, str(error)))
                    continue
                names.append(image.name)
                if sensor != "dem" and np.isnan(image.days):
                    problems.append(Problem(image.path, "no_date", "none in its name; stored without one"))
            if arrays:
                order = fill_dates(len(arrays), sensor, seed, key, images[0].patch)
                stored = np.stack([arrays[i] for i in order]), [names[i] for i in order]
                read.setdefault(sensor, {})[images[0].patch] = stored
    orders = dict(zip(_LOCAL, pair(*(list(read.get(sensor, {})) for sensor in _LOCAL)), strict=True))
    grid = Grid(key, {}, {})
    for sensor, stored_by_patch in read.items():
        if sensor in _LOCAL:
            grid.arrays[sensor] = np.stack([stored_by_patch[patch][0] for patch in orders[sensor]])
            grid.images[sensor] = [stored_by_patch[patch][1] for patch in orders[sensor]]
        else:
            array, grid.images[sensor] = stored_by_patch[""]
            grid.arrays[sensor] = array[0, 0] if sensor == "dem" else array
    return grid, problems
