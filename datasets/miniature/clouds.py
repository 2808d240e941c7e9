"""Benchmark tasks that ask for the clouds: those, the shadows and the snow that were drawn into the image are the label."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from copernicus.datasets.miniature import optical
from copernicus.datasets.miniature.noise import keyed_rng
from copernicus.datasets.miniature.places import random_points
from copernicus.datasets.miniature.planet import METRES_PER_DEGREE, Planet, Window
from copernicus.datasets.miniature.raster import tile_name, utm_epsg, write_tif
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import date_string, days_since_1970

_YEAR_START = int(days_since_1970("20210101"))

# ---------------------------------------------------------------- Cloud-S2

S2_CLEAR, S2_THICK, S2_THIN, S2_SHADOW = range(4)


def write_cloud_s2(planet: Planet, size: int, number: int, root: Path) -> str:
    """One scene of Sentinel-2, rarely clear and rarely overcast; returns its line in the split file."""
    seed, scene = planet.seed, 7_000_000 + number
    rng = keyed_rng(seed, "cloud s2", number)
    lons, lats = random_points(rng, 512)
    wide = planet.wide(lons, lats)
    # Land of all climates; every eighth scene is at sea.
    wanted = np.flatnonzero((wide.elevation > 5) if number % 8 else (wide.elevation < -20))
    if not len(wanted):
        raise InputError(f"miniature: the planet of seed {seed} has no place for a cloud scene; try another seed")
    lon, lat = float(lons[wanted[0]]), float(lats[wanted[0]])
    days = _YEAR_START + int(rng.integers(365))
    surface = planet.surface(Window(lon, lat, size, 10.0))
    cover, gain = float(rng.uniform(0.1, 0.75)), float(rng.uniform(0.85, 1.15))
    image = optical.s2_toa(seed, surface, days, scene, cover, gain)
    above = optical.sky(seed, surface.window, days, cover, scene)  # the very one that the image has
    label = np.full((size, size), S2_CLEAR, np.uint8)
    label[above.shadow > 0.35] = S2_SHADOW
    label[above.cloud > 0.12] = S2_THIN
    label[above.cloud > 0.5] = S2_THICK
    date, second = date_string(days), number % 60
    name = f"ROI_{number:05d}__{date}T1417{second:02d}_{date}T1422{second:02d}_T{tile_name(lon, lat)}"
    for folder, array in (("s2_toa", image.astype(np.uint16)), ("cloud", label[None])):
        write_tif(root / folder / f"{name}.tif", array, utm_epsg(lon, lat), lon, lat, (10.0, 10.0))
    return name


# ---------------------------------------------------------------- Cloud-S3

# Stored codes of cloud_multi. The sources name 2 and 3 in opposite order; here 2 is sure, 3 ambiguous.
INVALID, CLEAR, CLOUD_SURE, CLOUD_AMBIGUOUS, CLOUD_SHADOW, SNOW_ICE = range(6)


def write_cloud_s3(planet: Planet, size: int, number: int, root: Path) -> str:
    seed, scene = planet.seed, 2_000_000 + number
    rng = keyed_rng(seed, "cloud", number)
    # A third are chosen for snow: it is white too.
    want_snow = number % 3 == 0
    days = _YEAR_START + int(rng.integers(365))
    for _ in range(100):
        lons, lats = random_points(rng, 64, 66)
        wide = planet.wide(lons, lats)
        warm = np.cos(2 * np.pi * (optical.day_of_year(days) - 201) / 365.25) * np.where(lats >= 0, 1, -1)
        snowy = wide.temperature - 0.0062 * wide.elevation + wide.season * warm < -3
        good = np.flatnonzero((wide.elevation > 10) & (snowy == want_snow))
        if len(good):
            break
    else:
        raise InputError(f"miniature: the planet of seed {seed} has no place for a cloud scene; try another seed")
    lon, lat = float(lons[good[0]]), float(lats[good[0]])
    surface = planet.surface(Window(lon, lat, size, SENSORS["s3_olci"].gsd_m))
    air_above = optical.sky(seed, surface.window, days, rng.uniform(0.15, 0.75), scene)
    image = optical.s3_olci(seed, surface, days, scene, air_above)
    multi = np.full((size, size), CLEAR, np.uint8)
    snow = optical.materials(surface, days)[optical.SNOW_MATERIAL]
    multi[snow > 0.5] = SNOW_ICE
    multi[air_above.shadow > 0.4] = CLOUD_SHADOW
    multi[air_above.cloud > 0.15] = CLOUD_AMBIGUOUS
    multi[air_above.cloud > 0.55] = CLOUD_SURE
    beyond = optical.swath_gap(seed, size, scene, days, 0.25)
    image[:, beyond], multi[beyond] = np.nan, INVALID
    cloudy = np.isin(multi, (CLOUD_SURE, CLOUD_AMBIGUOUS))
    binary = np.where(multi == INVALID, 0, np.where(cloudy, 2, 1)).astype(np.uint8)

    date, second = date_string(days), int(rng.integers(60))
    name = (
        f"S3{'AB'[number % 2]}_OL_1_EFR____{date}T1015{second:02d}_{date}T1018{second:02d}_{date}T121500_0179_"
        f"{number % 999:03d}_{number % 385:03d}_2160_MAR_O_NT_002_{1 + number % 9:02d}_{1 + number % 7:02d}.tif"
    )
    window = surface.window
    pixel = (window.gsd_m / window.metres_per_degree_lon, window.gsd_m / METRES_PER_DEGREE)
    for folder, array in (("s3_olci", image), ("cloud_multi", multi[None]), ("cloud_binary", binary[None])):
        write_tif(root / folder / name, array, 4326, lon, lat, pixel)
    return name
