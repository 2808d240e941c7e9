"""Writing GeoTIFFs whose centre is a given place."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np


@lru_cache(maxsize=128)
def _crs(epsg: int):
    from rasterio.crs import CRS

    return CRS.from_epsg(epsg)


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
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.warp import transform

    channels, height, width = array_CHW.shape
    (x,), (y,) = ([lon], [lat]) if epsg == 4326 else transform(_crs(4326), _crs(epsg), [lon], [lat])
    origin = from_origin(x - width / 2 * pixel[0], y + height / 2 * pixel[1], *pixel)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = {"count": channels, "height": height, "width": width, "dtype": array_CHW.dtype.name}
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        crs=_crs(epsg),
        transform=origin,
        compress="deflate",
        zlevel=1,
        interleave="band",
        **kind,
    ) as tif:
        tif.write(array_CHW)
        if tags:
            tif.update_tags(**tags)
