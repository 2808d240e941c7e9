"""Four benchmark tasks from the miniature planet, in the layout of Copernicus-Bench: names, folders, types, codes.

    eurosat_s2/           land cover of a 640 m patch: the cover of its central point
    cloud_s3/             the clouds, shadows and snow that were drawn into the radiances
    flood_s1/             water that stands where the land is lowest, on the last of three dates
    airquality_s5p/no2/   NO2 at the ground, of which the column shows a blurred part

A sample is a pure function of (seed, task, number), so samples can be written by any number of workers. Rasters lie
north up around their centre; where the projection's grid is turned against north (EPSG:3035) the turn is neglected.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import uniform_filter

from copernicus.datasets.miniature import air, optical, radar
from copernicus.datasets.miniature.noise import keyed_rng
from copernicus.datasets.miniature.planet import METRES_PER_DEGREE, Cover, Planet, Wide, Window
from copernicus.datasets.miniature.raster import write_tif as _write_tif
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import date_string, days_since_1970

_YEAR_START = int(days_since_1970("20210101"))


@dataclass(frozen=True)
class TaskScale:
    """Pixels a side of a sample and samples per split."""

    size: int
    splits: tuple[tuple[str, int], ...]


# ---------------------------------------------------------------- places


def _habitat(cover: Cover, wide: Wide) -> np.ndarray:
    """Where to look for a land cover, as bool of the points."""
    land = wide.elevation > 2
    mild = land & (wide.temperature - 0.0062 * wide.elevation > -1)
    return {
        Cover.SEA_LAKE: (wide.elevation > -120) & ((wide.elevation < 6) | (wide.moisture > 0.75)),
        Cover.RIVER: mild & (wide.moisture > 0.3) & (wide.rugged < 0.5),
        Cover.FOREST: mild & (wide.wood > 0.3),
        Cover.HERBACEOUS: mild & (wide.wood < 0.4) & (wide.moisture > 0.25) & (wide.farm < 0.4),
        Cover.PASTURE: mild & (wide.farm > 0.5) & (wide.moisture > 0.4),
        Cover.ANNUAL_CROP: mild & (wide.farm > 0.5),
        Cover.PERMANENT_CROP: mild & (wide.farm > 0.5) & (wide.temperature > 14),
        Cover.RESIDENTIAL: mild & (wide.urban > 1.1) & (wide.industry < 1.2),
        Cover.INDUSTRIAL: mild & (wide.urban > 1.1) & (wide.industry > 0.2),
        Cover.HIGHWAY: mild & (wide.urban > -0.8) & (wide.rugged < 0.5),
    }[cover]


def _random_points(rng: np.random.Generator, count: int, max_lat: float = 62) -> tuple[np.ndarray, np.ndarray]:
    """Even over the sphere; latitudes within 0.1 degrees of a row of the grid, so that a window stays in its row."""
    lat = np.degrees(np.arcsin(rng.uniform(-1, 1, count) * np.sin(np.radians(max_lat))))
    return rng.uniform(-179, 179, count), np.round(lat * 4) / 4 + rng.uniform(-0.1, 0.1, count)


def find_place(
    planet: Planet, rng: np.random.Generator, cover: Cover, size: int, least: float, most: float = 1.0
) -> tuple[float, float]:
    """(lon, lat) of a point of that cover, around which a window at 10 m has between those shares of it.

    Raises:
        InputError: the planet has none.
    """
    search = size + 128
    margin = size // 2
    for _ in range(200):
        lon, lat = _random_points(rng, 256)
        candidates = np.flatnonzero(_habitat(cover, planet.wide(lon, lat)))
        for i in candidates[:12]:
            # A quick look at every fourth pixel first.
            coarse = Window(float(lon[i]), float(lat[i]), search // 4, 40.0)
            if not 0.6 * least <= np.mean(planet.surface(coarse).cover == cover) <= most + 0.3:
                continue
            window = Window(float(lon[i]), float(lat[i]), search, 10.0)
            mask = planet.surface(window).cover == cover
            around = uniform_filter(mask.astype(np.float32), size, mode="constant")
            good = mask & (around >= least) & (around <= most)
            good[:margin], good[-margin:], good[:, :margin], good[:, -margin:] = False, False, False, False
            places = np.argwhere(good)
            if len(places):
                row, column = places[rng.integers(len(places))]
                return float(window.lons[column]), float(window.lats[row])
    raise InputError(
        f"miniature: the planet of seed {planet.seed} has no {cover.name} of share {least}; try another seed"
    )


# ---------------------------------------------------------------- EuroSAT-S2

EUROSAT_COVERS = {
    "AnnualCrop": Cover.ANNUAL_CROP,
    "Forest": Cover.FOREST,
    "HerbaceousVegetation": Cover.HERBACEOUS,
    "Highway": Cover.HIGHWAY,
    "Industrial": Cover.INDUSTRIAL,
    "Pasture": Cover.PASTURE,
    "PermanentCrop": Cover.PERMANENT_CROP,
    "Residential": Cover.RESIDENTIAL,
    "River": Cover.RIVER,
    "SeaLake": Cover.SEA_LAKE,
}
_EUROSAT_SHARE = {"River": 0.06, "Highway": 0.05, "PermanentCrop": 0.4, "Pasture": 0.45}
_EUROSAT_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B09", "B10", "B11", "B12", "B8A")


def write_eurosat(planet: Planet, size: int, number: int, root: Path) -> str:
    """One patch; returns its line in the split file. Classes take turns, so that they are balanced."""
    names = list(EUROSAT_COVERS)
    label = names[number % len(names)]
    rng = keyed_rng(planet.seed, "eurosat", number)
    lon, lat = find_place(planet, rng, EUROSAT_COVERS[label], 64, _EUROSAT_SHARE.get(label, 0.5))
    surface = planet.surface(Window(lon, lat, size, 10.0))
    # Few scenes of EuroSAT are in deep winter or have clouds.
    summer = 200 if lat >= 0 else 17
    days = _YEAR_START + int(summer + rng.normal(0, 50)) % 365
    image = optical.s2_toa(planet.seed, surface, days, 1_000_000 + number, gain=rng.uniform(0.85, 1.15))
    order = [SENSORS["s2_toa"].bands.index(band) for band in _EUROSAT_BANDS]
    name = f"{label}_{number // len(names) + 1}"
    epsg = (32600 if lat >= 0 else 32700) + int((lon + 180) // 6) % 60 + 1
    path = root / "all_imgs" / label / f"{name}.tif"
    _write_tif(path, image[order].astype(np.uint16), epsg, lon, lat, (10.0, 10.0))
    return f"{name}.jpg"


# ---------------------------------------------------------------- Cloud-S3

# Stored codes of cloud_multi. The sources name 2 and 3 in opposite order; here 2 is sure, 3 ambiguous.
INVALID, CLEAR, CLOUD_SURE, CLOUD_AMBIGUOUS, CLOUD_SHADOW, SNOW_ICE = range(6)


def write_cloud(planet: Planet, size: int, number: int, root: Path) -> str:
    seed, scene = planet.seed, 2_000_000 + number
    rng = keyed_rng(seed, "cloud", number)
    # A third are chosen for snow: it is white too.
    want_snow = number % 3 == 0
    days = _YEAR_START + int(rng.integers(365))
    for _ in range(100):
        lons, lats = _random_points(rng, 64, 66)
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
        _write_tif(root / folder / name, array, 4326, lon, lat, pixel)
    return name


# ---------------------------------------------------------------- Flood-S1


def write_flood(planet: Planet, size: int, number: int, root: Path) -> tuple[str, dict]:
    """One place on three dates; returns its entry in the split file."""
    seed, scene = planet.seed, 3_000_000 + number
    rng = keyed_rng(seed, "flood", number)
    near = Cover.SEA_LAKE if number % 4 == 0 else Cover.RIVER
    lon, lat = find_place(planet, rng, near, size, 0.05, 0.5)
    surface = planet.surface(Window(lon, lat, size, 10.0))
    permanent = np.isin(surface.cover, (Cover.SEA_LAKE, Cover.RIVER))
    # The lowest land goes under, more of it the stronger the flood; dikes keep towns dry.
    open_land = ~permanent & ~np.isin(surface.cover, (Cover.RESIDENTIAL, Cover.INDUSTRIAL))
    flood = np.zeros_like(permanent)
    if rng.uniform() < 0.85 and open_land.any():
        low = surface.drainage + 0.15 * surface.broad
        flood = open_land & (low < np.quantile(low[open_land], rng.uniform(0.15, 0.7)))
    last = _YEAR_START + int(rng.integers(60, 365))
    days = {"SL2": last - 24, "SL1": last - 12, "MS1": last}
    valid = ~optical.swath_gap(seed, size, scene, last, 0.15)
    label = np.where(~valid, 3, np.where(flood, 2, np.where(permanent, 1, 0))).astype(np.uint8)

    activation, area = f"{1111000 + number % 40}", f"{1 + number % 3:02d}"
    digest = hashlib.md5(f"{seed} flood {number}".encode()).hexdigest()
    folder = root / "data" / activation / area / digest
    datasets: dict[str, dict] = {}

    def write(kind: str, array: np.ndarray, day: int) -> None:
        name = f"{kind}_{activation}_{area}_{date_string(day)}"
        _write_tif(folder / f"{name}.tif", array[None], 3857, lon, lat, (10.0 / np.cos(np.radians(lat)),) * 2)
        datasets[kind] = {"name": name, "source_date": date_string(day)}

    for when, day in days.items():
        image = 10 ** (radar.s1_grd(seed, surface, day, scene, flood if when == "MS1" else None) / 10)
        image[:, ~valid] = 0.0
        write(f"{when}_IVV", image[0], day)
        write(f"{when}_IVH", image[1], day)
    write("MK0_MLU", label, last)
    write("MK0_MNA", valid.astype(np.uint8), last)
    return digest, {"path": f"{activation}/{area}/{digest}", "info": {"datasets": datasets}}


# ---------------------------------------------------------------- AQ-NO2-S5P

_SEASONS = (
    ("2021-01-01_2021-04-01", (1, 2, 3)),
    ("2021-04-01_2021-07-01", (4, 5, 6)),
    ("2021-07-01_2021-10-01", (7, 8, 9)),
    ("2021-10-01_2021-12-31", (10, 11, 12)),
)


def write_air_quality(planet: Planet, size: int, number: int, root: Path) -> str:
    """One place in Europe's latitudes, near cities every other time; returns its line in the split file."""
    seed, scene = planet.seed, 4_000_000 + number
    rng = keyed_rng(seed, "air quality", number)
    # Near the axis of EPSG:3035, whose grid turns away from north with distance.
    lon, lat = rng.uniform(-10, 30, 2000), rng.uniform(35, 66, 2000)
    wide = planet.wide(lon, lat)
    score = np.where(wide.elevation > 0, 1.0, 0.0) + (wide.urban > 1.0) * (number % 2)
    i = int(np.argmax(score + 0.1 * rng.uniform(size=score.shape)))
    lon_i, lat_i = float(lon[i]), float(lat[i])
    surface = planet.surface(Window(lon_i, lat_i, size, 1113.2))
    months = [[days_since_1970(f"2021{month:02d}01") for month in season] for _, season in _SEASONS]
    columns = [[air.column(seed, "s5p_no2", surface, day, scene) for day in days] for days in months]
    seasonal = [air.mean_column(season) for season in columns]
    annual = air.mean_column([month for season in columns for month in season])
    label = air.surface_no2(seed, surface)
    label = np.where(surface.cover == Cover.SEA_LAKE, -np.float32(3.4e38), label)  # no data, as in the source's maps
    place = f"EEA_1kmgrid_2021_no2_avg_{number // 40:02d}_{number % 40:02d}"
    for (season, _), image in zip(_SEASONS, seasonal, strict=True):
        _write_tif(root / "s5p_seasonal" / place / f"{season}.tif", image, 3035, lon_i, lat_i, (1113.2, 1113.2))
    annual_path = root / "s5p_annual" / place / "2021-01-01_2021-12-31.tif"
    _write_tif(annual_path, annual, 3035, lon_i, lat_i, (1113.2, 1113.2))
    _write_tif(root / "label_annual" / f"{place}.tif", label[None], 3035, lon_i, lat_i, (1113.2, 1113.2))
    return place


@dataclass(frozen=True)
class MiniatureTask:
    """How a task is written: its folder, the name of a split's file, and the writer of one sample."""

    directory: str
    split_file: str
    write_sample: Callable[[Planet, int, int, Path], object]


TASKS = {
    "eurosat_s2": MiniatureTask("eurosat_s2", "eurosat-{}.txt", write_eurosat),
    "cloud_s3": MiniatureTask("cloud_s3", "{}.csv", write_cloud),
    "flood_s1": MiniatureTask("flood_s1", "grid_dict_{}.json", write_flood),
    "aq_no2_s5p": MiniatureTask("airquality_s5p/no2", "{}.csv", write_air_quality),
}
