"""GeoTIFFs: pixels, and the place and day that file and name tell."""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.warp import transform as transform_coordinates

from copernicus.datasets.sensors import InputError

# Each sample is a few small files: without this GDAL lists the folder of each one it opens.
GDAL_OPTIONS = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
WGS84 = CRS.from_epsg(4326)
EPOCH = datetime.date(1970, 1, 1)
NOWHERE = (math.nan, math.nan)


@dataclass(frozen=True)
class Raster:
    """An image as it is stored: one GeoTIFF, several of the same extent, or a row of a table."""

    values_Chw: np.ndarray
    descriptions: tuple[str | None, ...] = ()  # names of the bands, where the file gives them
    centre: tuple[float, float] = NOWHERE  # lon, lat in degrees; NaN: no georeference
    pixel_centre: tuple[float, float] = NOWHERE  # of pixel (h // 2, w // 2); NaN: no coordinate system
    days: float = math.nan  # since 1970-01-01


def read_raster(paths: Sequence[Path], date_regex: str = "") -> Raster:
    """The bands of GeoTIFFs of the same extent, one after the other, with the place and the day of the first.

    Raises:
        InputError: a file cannot be read, the files differ in size, or a name has a date that is none; named.
    """
    values, descriptions = [], []
    centre = pixel_centre = NOWHERE
    for path in paths:
        try:
            with rasterio.open(path) as source:
                values.append(source.read())
                descriptions.extend(source.descriptions)
                if path == paths[0]:
                    pixel_centre = _locate(source, source.width // 2 + 0.5, source.height // 2 + 0.5)
                    if not source.transform.is_identity:
                        centre = _locate(source, source.width / 2, source.height / 2)
        except RasterioError as error:
            raise InputError(f"{path}: cannot be read as GeoTIFF ({error})") from error
        if values[-1].shape[1:] != values[0].shape[1:]:
            raise InputError(f"{path}: {values[-1].shape[1:]} pixels, but {paths[0]} has {values[0].shape[1:]}")
    days = find_date(paths[0], date_regex) if date_regex else math.nan
    return Raster(np.concatenate(values), tuple(descriptions), centre, pixel_centre, days)


def read_label(path: Path) -> np.ndarray:
    """The one band of a label's GeoTIFF, (h, w).

    Raises:
        InputError: the file cannot be read or has several bands.
    """
    values = read_raster((path,)).values_Chw
    if len(values) != 1:
        raise InputError(f"{path}: {len(values)} bands, a label has 1")
    return values[0]


def _locate(source: rasterio.DatasetReader, column: float, row: float) -> tuple[float, float]:
    """Longitude and latitude of a point given in pixels from the upper left corner; NaN where there is no coordinate
    system, or the point lies outside of what it can express."""
    if source.crs is None:
        return NOWHERE
    a = source.transform
    x, y = a.a * column + a.b * row + a.c, a.d * column + a.e * row + a.f
    if source.crs == WGS84:
        return x, y
    (lon,), (lat,) = transform_coordinates(source.crs, WGS84, [x], [y])
    return (lon, lat) if math.isfinite(lon) and math.isfinite(lat) else NOWHERE


def find_date(path: Path, pattern: str) -> float:
    """Days since 1970-01-01 from a file name; NaN where the pattern does not occur.

    Raises:
        InputError: the pattern occurs, with something that is no date.
    """
    match = re.search(pattern, path.name)
    if match is None:
        return math.nan
    text = next(value for value in match.groupdict().values() if value).replace("-", "")
    try:
        day = datetime.date(int(text[:4]), int(text[4:6]), int(text[6:8]))
    except ValueError as error:
        raise InputError(f"{path}: {text!r} in the name is no date ({error})") from error
    return float((day - EPOCH).days)
