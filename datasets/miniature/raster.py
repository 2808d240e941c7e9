"""Writing GeoTIFFs whose centre is a given place, or none; UTM zones and the names of their tiles."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np


@lru_cache(maxsize=128)
def _crs(epsg: int):
    from rasterio.crs import CRS

    return CRS.from_epsg(epsg)


def utm_epsg(lon: float, lat: float) -> int:
    """EPSG code of the UTM zone of a place."""
    return (32600 if lat >= 0 else 32700) + int((lon + 180) // 6) % 60 + 1


_BANDS = "CDEFGHJKLMNPQRSTUVWX"  # of 8 degrees, from 80 south
_COLUMNS = ("ABCDEFGH", "JKLMNPQR", "STUVWXYZ")
_ROWS = "ABCDEFGHJKLMNPQRSTUV"


def tile_name(lon: float, lat: float) -> str:
    """The 100 km square of the military grid that holds a place, e.g. ``32UPU``; latitudes within 80 degrees."""
    from rasterio.warp import transform

    zone = utm_epsg(lon, lat) % 100
    (east,), (north,) = transform(_crs(4326), _crs(utm_epsg(lon, lat)), [lon], [lat])
    column = _COLUMNS[(zone - 1) % 3][int(east // 100_000) - 1]
    row = _ROWS[(int(north // 100_000) + (0 if zone % 2 else 5)) % 20]
    return f"{zone:02d}{_BANDS[int((lat + 80) // 8)]}{column}{row}"


def write_tif(
    path: Path,
    array_CHW: np.ndarray,
    epsg: int,
    lon: float,
    lat: float,
    pixel: tuple[float, float],
    tags: Mapping[str, str] | None = None,
) -> None:
    """A GeoTIFF whose centre is the place given; pixel width and height in the units of the reference system."""
    from rasterio.transform import from_origin
    from rasterio.warp import transform

    _, height, width = array_CHW.shape
    (x,), (y,) = ([lon], [lat]) if epsg == 4326 else transform(_crs(4326), _crs(epsg), [lon], [lat])
    origin = from_origin(x - width / 2 * pixel[0], y + height / 2 * pixel[1], *pixel)
    _write(path, array_CHW, epsg, tags, transform=origin)


def write_unplaced_tif(path: Path, array_CHW: np.ndarray, epsg: int) -> None:
    """A GeoTIFF that names a reference system and has no place in it."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        _write(path, array_CHW, epsg, None)


def _write(path: Path, array_CHW: np.ndarray, epsg: int, tags: Mapping[str, str] | None, **place: Any) -> None:
    import rasterio

    channels, height, width = array_CHW.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"count": channels, "height": height, "width": width, "dtype": array_CHW.dtype.name}
    with rasterio.open(
        path, "w", driver="GTiff", crs=_crs(epsg), compress="deflate", zlevel=1, interleave="band", **kind, **place
    ) as tif:
        tif.write(array_CHW)
        if tags:
            tif.update_tags(**tags)
