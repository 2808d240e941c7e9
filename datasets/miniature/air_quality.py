"""The benchmark's air-quality tasks: NO2 and ozone at the ground, of which the columns show a part.

Where the projection's grid (EPSG:3035) is turned against north the turn is neglected.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from copernicus.datasets.miniature import air
from copernicus.datasets.miniature.noise import keyed_rng
from copernicus.datasets.miniature.planet import Cover, Planet, Window
from copernicus.datasets.miniature.raster import write_tif
from copernicus.datasets.shards import days_since_1970

_SEASONS = (
    ("2021-01-01_2021-04-01", (1, 2, 3)),
    ("2021-04-01_2021-07-01", (4, 5, 6)),
    ("2021-07-01_2021-10-01", (7, 8, 9)),
    ("2021-10-01_2021-12-31", (10, 11, 12)),
)


_SUMMER = (4, 5, 6, 7, 8, 9)
_PIXEL_M = 1113.2


def write_no2(planet: Planet, size: int, number: int, root: Path) -> str:
    return _write(planet, size, number, root, "s5p_no2")


def write_o3(planet: Planet, size: int, number: int, root: Path) -> str:
    return _write(planet, size, number, root, "s5p_o3")


def _write(planet: Planet, size: int, number: int, root: Path, gas: Literal["s5p_no2", "s5p_o3"]) -> str:
    """One place in Europe's latitudes, near cities every other time; returns its line in the split file. Both gases are
    of the same places."""
    seed, scene = planet.seed, 4_000_000 + number
    rng = keyed_rng(seed, "air quality", number)
    # Near the axis of EPSG:3035, whose grid turns away from north with distance.
    lons, lats = rng.uniform(-10, 30, 2000), rng.uniform(35, 66, 2000)
    wide = planet.wide(lons, lats)
    score = np.where(wide.elevation > 0, 1.0, 0.0) + (wide.urban > 1.0) * (number % 2)
    i = int(np.argmax(score + 0.1 * rng.uniform(size=score.shape)))
    lon, lat = float(lons[i]), float(lats[i])
    surface = planet.surface(Window(lon, lat, size, _PIXEL_M))
    months = [[_first_day(month) for month in season] for _, season in _SEASONS]
    columns = [[air.column(seed, gas, surface, day, scene) for day in days] for days in months]
    seasonal = [air.mean_column(season) for season in columns]
    annual = air.mean_column([month for season in columns for month in season])
    if gas == "s5p_no2":
        label = air.surface_no2(seed, surface)
    else:
        label = air.surface_o3(seed, surface, [_first_day(month) for month in _SUMMER])
    label = np.where(surface.cover == Cover.SEA_LAKE, -np.float32(3.4e38), label)  # no data, as in the source's maps
    place = f"EEA_1kmgrid_2021_{gas.removeprefix('s5p_')}_avg_{number // 40:02d}_{number % 40:02d}"
    files = {f"s5p_seasonal/{place}/{season}": image for (season, _), image in zip(_SEASONS, seasonal, strict=True)}
    files |= {f"s5p_annual/{place}/2021-01-01_2021-12-31": annual, f"label_annual/{place}": label[None]}
    for path, array in files.items():
        write_tif(root / f"{path}.tif", array, 3035, lon, lat, (_PIXEL_M, _PIXEL_M))
    return place


def _first_day(month: int) -> float:
    return days_since_1970(f"2021{month:02d}01")
