"""Co-registered images of some sites, packed into shards of the published pretraining format.

A folder of images holds one folder per sensor and in it one file per site, of the same name in each:

    FOLDER/S2L1C/<site>.tif  FOLDER/S1RTC/<site>.tif  FOLDER/DEM/<site>.tif  FOLDER/index.csv (optional)

``index.csv`` names a site in its first column and may give dates that the files do not carry: in columns such as
``s2_datetime`` (the sensor's name up to its underscore), or ``datetime`` for all sensors.
"""

from __future__ import annotations

import csv
import datetime
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from copernicus.datasets.geotiff import Image, parse_date, read_image
from copernicus.datasets.sensors import SENSORS, InputError, get_sensor
from copernicus.datasets.shards import (
    LEADING_AXES,
    Grid,
    grid_index,
    grid_key,
    grid_name,
    patch_name,
    write_shards,
)
from copernicus.datasets.stored import as_stored, published_dates

_SUFFIXES = (".tif", ".tiff", ".nc")


@dataclass
class ConvertReport:
    """What `convert_sites` did. ``skipped``: what was left out -> why. ``notes``: what the files' reading assumed."""

    sites: int = 0
    grids: int = 0
    shards: list[Path] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)


def convert_sites(
    folder: Path | str,
    out: Path | str,
    sensors: Mapping[str, str],
    sizes: Mapping[str, int] | None = None,
    patches_per_side: int = 1,
    grids_per_shard: int = 100,
    progress: Callable[[int], None] | None = None,
) -> ConvertReport:
    """Packs co-registered sites into ``out/example-000000.tar`` and so on.

    A site lies in the grid cell nearest to its centre; sites of one cell become local patches of one grid (of the
    sensors without local patches the first site's image is kept). A sensor that a site lacks is left out for it. There
    is one date per image: it is repeated to the published number. As published, an image's shorter side is resampled
    to the stored size (not at all if it has it), its centre is cut out, and Sentinel-2 becomes int16 (NaN: 0).

    Args:
        sensors: name of a sensor's folder -> its name, such as ``{"S2L1C": "s2_toa", "S1RTC": "s1_grd"}``.
        sizes: sensor -> stored side, pixels; the published one where not given.
        patches_per_side: s1 and s2 images are first cut into this many by this many local patches.
        progress: called after each shard with the number of grids written.

    Raises:
        InputError: folders or sensors that do not exist, ``out`` that holds shards already, or no site to pack.
    """
    folder, out, sizes = Path(folder), Path(out), dict(sizes or {})
    if patches_per_side < 1:
        raise InputError(f"patches_per_side is {patches_per_side}; it must be at least 1")
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not sensors:
        raise InputError("name the folder of each sensor, such as S2L1C=s2_toa")
    if any(out.glob("*.tar")):
        raise InputError(f"{out} holds shards already; give a new folder")
    for name in (*sensors.values(), *sizes):
        get_sensor(name)
        if name not in sensors.values():
            raise InputError(f"a size is given for {name}, but none of the folders is of that sensor")
    if len(set(sensors.values())) < len(sensors):
        raise InputError(f"two folders are given for one sensor: {dict(sensors)}")
    files: dict[str, dict[str, Path]] = {}
    for name, sensor in sensors.items():
        if not (folder / name).is_dir():
            raise InputError(f"{folder / name}: no such folder (given for {sensor})")
        for path in sorted((folder / name).iterdir()):
            if path.suffix.lower() in _SUFFIXES:
                files.setdefault(path.stem, {})[sensor] = path
    index = _read_index(folder / "index.csv")
    report = ConvertReport()
    for site in sorted(index.keys() - files.keys()):
        report.skipped[site] = "listed in index.csv, but no sensor's folder has it"

    # Everything is read once before anything is written, so that what is wrong is known and cells can be shared.
    cells: dict[int, list[tuple[str, dict[str, Path]]]] = {}
    for site, paths in sorted(files.items()):
        usable: dict[str, Path] = {}
        place = None
        for sensor in sensors.values():
            if sensor not in paths:
                report.skipped[f"{site} {sensor}"] = "no file"
                continue
            try:
                image = _read(paths[sensor], sensor)
            except InputError as error:
                report.skipped[f"{site} {sensor}"] = str(error)
                continue
            usable[sensor] = paths[sensor]
            place = place or (image.lon, image.lat)
            notes = [note for note in image.notes if not note.startswith("date unknown")]
            if sensor != "dem" and _date(image, sensor, index.get(site, {})) is None:
                notes.append("date unknown: neither in the file's name, its tags nor index.csv; stored without one")
            if notes:
                report.notes[f"{site} {sensor}"] = tuple(notes)
        if place:
            cells.setdefault(grid_index(*place), []).append((site, usable))
    if not cells:
        reasons = "\n  ".join(f"{what}: {why}" for what, why in report.skipped.items())
        raise InputError(f"{folder}: no site to pack\n  {reasons or 'its folders hold no .tif or .nc file'}")
    report.sites, report.grids = sum(map(len, cells.values())), len(cells)
    grids = _grids(cells, index, sizes, patches_per_side, report)
    report.shards = write_shards(grids, out, grids_per_shard, progress)
    return report


def _read(path: Path, sensor: str) -> Image:
    """As `read_image`, for storing: all bands, a place, and raw numbers to which the sensor's own scale applies.

    Raises:
        InputError: also for a file that lacks one of these.
    """
    spec = get_sensor(sensor)
    image = read_image(path, spec)
    if image.sensor.bands != spec.bands:
        raise InputError(f"{path}: stored are all {spec.channels} bands of {sensor}, it has {len(image.sensor.bands)}")
    if np.isnan(image.lon):
        raise InputError(f"{path}: its place is unknown, and a grid is named after it")
    return image


def _read_index(path: Path) -> dict[str, dict[str, str]]:
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        first = (reader.fieldnames or [""])[0]
        rows = {row[first]: row for row in reader if row[first]}
    return {
        name.removesuffix(Path(name).suffix) if name.endswith(_SUFFIXES) else name: row for name, row in rows.items()
    }


def _date(image: Image, sensor: str, row: Mapping[str, str]) -> datetime.datetime | None:
    if image.acquired:
        return image.acquired
    family = sensor.split("_")[0]
    for column in (f"{family}_datetime", f"{family}_date", "datetime", "date"):
        if row.get(column) and (date := parse_date(row[column])):
            return date
    return None


def _grids(
    cells: Mapping[int, list[tuple[str, dict[str, Path]]]],
    index: Mapping[str, Mapping[str, str]],
    sizes: Mapping[str, int],
    patches_per_side: int,
    report: ConvertReport,
) -> Iterator[Grid]:
    for cell, sites in sorted(cells.items()):
        arrays: dict[str, list[np.ndarray]] = {}
        names: dict[str, list] = {}
        patches = 0
        # Sites with more sensors come first, so that patch i of s1 and patch i of s2 show the same place.
        for site, paths in sorted(sites, key=lambda entry: -len(entry[1])):
            for sensor, path in paths.items():
                local = "patch" in LEADING_AXES[sensor]
                if not local and sensor in arrays:
                    report.skipped[f"{site} {sensor}"] = f"grid {grid_key(cell)} has one of another site already"
                    continue
                image = _read(path, sensor)
                date = _date(image, sensor, index.get(site, {}))
                suffix = f"/{date:%Y%m%d}" if date and sensor != "dem" else ""
                dates = published_dates(sensor)
                cut = _cut(
                    image, sensor, sizes.get(sensor, SENSORS[sensor].stored_size), patches_per_side if local else 1
                )
                for number, (stored_CHW, lon, lat) in enumerate(cut):
                    patch = f"/{patch_name(patches + number, lon, lat)}" if local else ""
                    arrays.setdefault(sensor, []).append(np.repeat(stored_CHW[None], dates, axis=0))
                    names.setdefault(sensor, []).append([grid_name(cell) + patch + suffix] * dates)
            patches += patches_per_side**2
        grid = Grid(key=grid_key(cell), arrays={}, images={})
        for sensor in arrays:
            local = "patch" in LEADING_AXES[sensor]
            array = np.stack(arrays[sensor]) if local else arrays[sensor][0]
            grid.arrays[sensor] = array[0, 0] if sensor == "dem" else array
            grid.images[sensor] = names[sensor] if local else names[sensor][0]
        yield grid


def _cut(image: Image, sensor: str, size: int, per_side: int) -> Iterator[tuple[np.ndarray, float, float]]:
    """The image's per_side x per_side parts as they are stored, (C, size, size), and the place of their centres."""
    spec = SENSORS[sensor]
    # Radiance, say, back to the numbers that the sensor's own scale turns into radiance.
    factor_C = np.broadcast_to(image.sensor.scale, spec.channels) / np.broadcast_to(spec.scale, spec.channels)
    raw_CHW = image.array_CHW * factor_C[:, None, None].astype(np.float32)
    height, width = (side // per_side for side in raw_CHW.shape[1:])
    for row in range(0, height * per_side, height):
        for col in range(0, width * per_side, width):
            part_CHW = raw_CHW[:, row : row + height, col : col + width]
            yield as_stored(part_CHW, sensor, size), *image.locate(row + height / 2, col + width / 2)
