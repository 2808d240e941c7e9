"""The raw layout as an index: each stored image is a file, so that training reads GeoTIFFs as it reads shards.

A grid's arrays are those that `raw.load_grid` would store: the published number of dates, fewer ones repeated by the same
keyed draw, patches of s1 and s2 paired. A draw of a grid is therefore the same from raw images and from the shards that
`copernicus data convert` makes of them (as long as every image can be read: what cannot is left out there, and here
named when it is drawn).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import rasterio
import rasterio.errors

from copernicus.datasets.baseline import known_offset
from copernicus.datasets.raw import RawImage, RawLayout
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import LEADING_AXES, STORED_DTYPE, Problem, grid_center
from copernicus.datasets.storage import Stamp
from copernicus.datasets.stored import fill_dates, published_dates
from copernicus.datasets.survey import GridSurvey, SensorAt, ShardSurvey

SURPLUS = "too_many_dates"
"""Dates beyond the published number are left out; the grid is whole all the same."""


def survey_layout(layout: RawLayout, sizes: Mapping[str, int] | None = None, seed: int = 0) -> ShardSurvey:
    """All grids of a raw layout, as if its folder were one shard. Files are not looked at.

    Args:
        sizes: sensor -> stored side, pixels; the published one where not given.
        seed: of the repeated dates.
    """
    grids = [_grid(layout, key, sizes or {}, seed) for key in layout.keys]
    return ShardSurvey(str(layout.folder), Stamp(0, ""), grids, [])  # what the data are is in their digest


def unknown_offsets(layout: RawLayout, most: int = 32) -> tuple[int, int]:
    """(of how many Sentinel-2 images the metadata do not tell the radiometric offset, images looked at): one image each
    of up to ``most`` grids, evenly spread."""
    keys = layout.keys[:: max(1, len(layout.keys) // most)][:most]
    looked = unknown = 0
    for key in keys:
        for image in (i for patch in layout.grid(key).images.get("s2_toa", ())[:1] for i in patch[:1]):
            try:
                with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"), _geotiff(layout, image) as tif:
                    tags = tif.tags()
            except rasterio.errors.RasterioError:
                continue  # named when it is drawn
            looked += 1
            unknown += known_offset(layout.locate(image).name, tags) is None
    return unknown, looked


def _geotiff(layout: RawLayout, image: RawImage) -> rasterio.DatasetReader:
    """Opened as GeoTIFF and nothing else: a stranger's .tif may be a VRT that points elsewhere."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        return rasterio.open(layout.locate(image), driver="GTiff")


def _grid(layout: RawLayout, key: str, sizes: Mapping[str, int], seed: int) -> GridSurvey:
    raw = layout.grid(key)
    grid = GridSurvey(key)
    grid.lon, grid.lat = grid_center(int(key))
    for sensor, patches in raw.images.items():
        spec, dates = SENSORS[sensor], published_dates(sensor)
        size = sizes.get(sensor, spec.stored_size)
        images = []
        for listed in patches:
            for surplus in listed[dates:]:
                grid.problems.append(Problem(f"{layout.folder}:{key}.{sensor}:{surplus.path}", SURPLUS, "left out"))
            order = fill_dates(min(len(listed), dates), sensor, seed, key, listed[0].patch)
            images += [listed[i] for i in order]
        local = "patch" in LEADING_AXES[sensor]
        leading = () if sensor == "dem" else (len(patches), dates) if local else (dates,)
        bands = () if sensor == "dem" else (spec.channels,)
        firsts = images[::dates] if local else []
        grid.sensors[sensor] = SensorAt(
            STORED_DTYPE[sensor].name,
            (*leading, *bands, size, size),
            offset=0,
            member=0,
            size=0,
            whole="a GeoTIFF an image",
            days=() if sensor == "dem" else tuple(None if math.isnan(i.days) else int(i.days) for i in images),
            lon=tuple(i.lon for i in firsts),
            lat=tuple(i.lat for i in firsts),
            local=tuple(i.patch.split("_", 1)[0] for i in firsts),
            files=tuple(str(layout.locate(i).relative_to(layout.folder)) for i in images),
        )
    return grid
