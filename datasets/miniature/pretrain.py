"""The miniature planet's pretraining grids: which cells are taken, where patches lie, what each sensor sees there."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from copernicus.datasets.miniature import air, optical, radar
from copernicus.datasets.miniature.noise import keyed_rng
from copernicus.datasets.miniature.planet import Planet, Window
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import (
    Grid,
    date_string,
    days_since_1970,
    grid_center,
    grid_index,
    grid_key,
    grid_name,
    patch_name,
)

_YEAR_START = int(days_since_1970("20210101"))
_MISSING_SHARE = 0.2  # of the grids lack one sensor or more; about 90k of 310k do in the published data


@dataclass(frozen=True)
class PretrainScale:
    """Sizes of a grid's arrays: patches, dates, pixels a side."""

    patches: int
    local_dates: int  # s1, s2
    s3_dates: int
    s5p_dates: int
    local_size: int
    s3_size: int
    s5p_size: int
    dem_size: int
    grids_per_shard: int


def choose_grids(planet: Planet, count: int) -> list[int]:
    """Distinct grid numbers, in random order: inhabited land mostly, some wilderness, ice, coast and sea."""
    rng = keyed_rng(planet.seed, "choose grids")
    chosen: dict[int, None] = {}
    while len(chosen) < count:
        n = 4096
        lat = np.degrees(np.arcsin(rng.uniform(np.sin(np.radians(-66)), np.sin(np.radians(72)), n)))
        lon = rng.uniform(-180, 180, n)
        wide = planet.wide(lon, lat)
        land = wide.elevation > 0
        wanted = np.where(land, 0.2, np.where(wide.elevation > -120, 0.15, 0.02))
        wanted = np.where(land & (wide.farm > 0), 0.6, wanted)
        wanted = np.where(land & (wide.urban > 0.8), 1.0, wanted)
        wanted = np.where(land & (wide.temperature < -8), 0.06, wanted)
        for i in np.flatnonzero(rng.uniform(size=n) < wanted):
            chosen.setdefault(grid_index(float(lon[i]), float(lat[i])))
    return list(chosen)[:count]


def _dates(rng: np.random.Generator, count: int) -> list[int]:
    """Spread over the year 2021, one in each part of it."""
    return [_YEAR_START + int((i + u) * 365 / count) for i, u in enumerate(rng.uniform(0.05, 0.95, count))]


def _patch_centres(planet: Planet, index: int, rng: np.random.Generator, count: int) -> list[tuple[float, float]]:
    """Half of them where the cell is most inhabited, as published patches gather near towns; the others anywhere."""
    lon, lat = grid_center(index)
    offsets = rng.uniform(-0.1, 0.1, (count, 12, 2))
    centres = []
    for offset in offsets:
        wide = planet.wide(lon + offset[:, 0], lat + offset[:, 1])
        inhabited = np.maximum(wide.urban, wide.farm - 0.5) * (wide.elevation > 0)
        pick = int(np.argmax(inhabited)) if rng.uniform() < 0.5 else 0
        centres.append((lon + float(offset[pick, 0]), lat + float(offset[pick, 1])))
    return centres


def make_grid(planet: Planet, index: int, scale: PretrainScale) -> Grid:
    """All that the sensors see of one grid, as it is stored."""
    seed = planet.seed
    rng = keyed_rng(seed, "grid", index)
    name = grid_name(index)
    lon, lat = grid_center(index)
    arrays: dict[str, np.ndarray] = {}
    images: dict[str, list] = {}

    s1, s2 = [], []
    s1_names, s2_names = [], []
    for patch, (patch_lon, patch_lat) in enumerate(_patch_centres(planet, index, rng, scale.patches)):
        surface = planet.surface(Window(patch_lon, patch_lat, scale.local_size, SENSORS["s2_toa"].gsd_m))
        folder = f"{name}/{patch_name(patch, patch_lon, patch_lat)}"
        scene = index * 16 + patch
        radar_days, optical_days = _dates(rng, scale.local_dates), _dates(rng, scale.local_dates)
        cloudy = [0.0 if u < 0.7 else (u - 0.7) for u in rng.uniform(size=scale.local_dates)]
        s1.append([radar.s1_grd(seed, surface, day, scene) for day in radar_days])
        s2.append([optical.s2_toa(seed, surface, day, scene, c) for day, c in zip(optical_days, cloudy, strict=True)])
        s1_names.append([f"{folder}/{date_string(day)}" for day in radar_days])
        s2_names.append([f"{folder}/{date_string(day)}" for day in optical_days])
    arrays["s1_grd"], images["s1_grd"] = np.stack([np.stack(patch) for patch in s1]), s1_names
    arrays["s2_toa"], images["s2_toa"] = np.stack([np.stack(patch) for patch in s2]), s2_names

    surface = planet.surface(Window(lon, lat, scale.s3_size, SENSORS["s3_olci"].gsd_m))
    days = _dates(rng, scale.s3_dates)
    olci = []
    for day in days:
        cover = float(np.clip(rng.uniform(-0.4, 0.7), 0, 1))
        image = optical.s3_olci(seed, surface, day, index, optical.sky(seed, surface.window, day, cover, index))
        image[:, optical.swath_gap(seed, scale.s3_size, index, day, 0.12)] = np.nan
        olci.append(image)
    arrays["s3_olci"] = np.stack(olci)
    images["s3_olci"] = [f"{name}/{date_string(day)}" for day in days]

    surface = planet.surface(Window(lon, lat, scale.s5p_size, SENSORS["s5p_no2"].gsd_m))
    months = [int(days_since_1970(f"2021{1 + i * 12 // scale.s5p_dates:02d}01")) for i in range(scale.s5p_dates)]
    for gas in air.GASES:
        arrays[gas] = np.stack([air.column(seed, gas, surface, month, index) for month in months])
        images[gas] = [f"{name}/{date_string(month)}" for month in months]

    arrays["dem"] = planet.elevation(Window(lon, lat, scale.dem_size, SENSORS["dem"].gsd_m))
    images["dem"] = [name]

    missing = keyed_rng(seed, "missing sensors", index)
    if missing.uniform() < _MISSING_SHARE:
        for sensor in missing.choice(list(SENSORS), size=missing.integers(1, 4), replace=False):
            del arrays[str(sensor)], images[str(sensor)]
    return Grid(grid_key(index), arrays, images)
