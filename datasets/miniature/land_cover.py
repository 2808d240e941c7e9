"""Benchmark tasks that ask Sentinel-1 and Sentinel-2 for the land cover: EuroSAT, BigEarthNet, DFC2020.

Both sensors of a task see the same places, at 10 m. Rasters lie north up around their centre.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from copernicus.datasets.miniature import legends, optical, radar
from copernicus.datasets.miniature.noise import keyed_rng
from copernicus.datasets.miniature.places import find_place
from copernicus.datasets.miniature.planet import Cover, Planet, Window
from copernicus.datasets.miniature.raster import tile_name, utm_epsg, write_tif, write_unplaced_tif
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import date_string, days_since_1970

_YEAR_START = int(days_since_1970("20210101"))

# ---------------------------------------------------------------- EuroSAT

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


def write_eurosat_s1(planet: Planet, size: int, number: int, root: Path) -> str:
    return _write_eurosat(planet, size, number, root, "s1")


def write_eurosat_s2(planet: Planet, size: int, number: int, root: Path) -> str:
    return _write_eurosat(planet, size, number, root, "s2")


def _write_eurosat(planet: Planet, size: int, number: int, root: Path, sensor: str) -> str:
    """One patch; returns its line in the split file. Classes take turns, so that they are balanced. The label is the
    cover of the central point."""
    names = list(EUROSAT_COVERS)
    label = names[number % len(names)]
    rng = keyed_rng(planet.seed, "eurosat", number)
    lon, lat = find_place(planet, rng, EUROSAT_COVERS[label], 64, _EUROSAT_SHARE.get(label, 0.5))
    surface = planet.surface(Window(lon, lat, size, 10.0))
    # Few scenes of EuroSAT are in deep winter or have clouds.
    summer = 200 if lat >= 0 else 17
    days = _YEAR_START + int(summer + rng.normal(0, 50)) % 365
    scene = 1_000_000 + number
    if sensor == "s1":
        image = radar.s1_grd(planet.seed, surface, days, scene)
    else:
        image = optical.s2_toa(planet.seed, surface, days, scene, gain=rng.uniform(0.85, 1.15))
        image = image[[SENSORS["s2_toa"].bands.index(band) for band in _EUROSAT_BANDS]].astype(np.uint16)
    name = f"{label}_{number // len(names) + 1}"
    write_tif(root / "all_imgs" / label / f"{name}.tif", image, utm_epsg(lon, lat), lon, lat, (10.0, 10.0))
    return f"{name}.jpg"


# ---------------------------------------------------------------- BigEarthNet

# What to look for in turn, and the least share of it: every class of the map is then found somewhere.
_BIGEARTHNET_HABITATS = (
    (Cover.ANNUAL_CROP, 0.3),
    (Cover.FOREST, 0.3),
    (Cover.RESIDENTIAL, 0.15),
    (Cover.PASTURE, 0.2),
    (Cover.SEA_LAKE, 0.15),
    (Cover.HERBACEOUS, 0.3),
    (Cover.PERMANENT_CROP, 0.1),
    (Cover.INDUSTRIAL, 0.1),
    (Cover.RIVER, 0.04),
    (Cover.BARE, 0.3),
)
# Most water that is found is a lake's: every other time that it is water's turn, look on for the sea.
_COAST_TURN, _COAST_TRIES = 4, 20
_BIGEARTHNET_BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")


def write_bigearthnet(planet: Planet, size: int, number: int, root: Path) -> list:
    """One pair of patches, radar a few days from optical; returns its row: the two paths, then 19 labels."""
    seed, scene = planet.seed, 5_000_000 + number
    rng = keyed_rng(seed, "bigearthnet", number)
    cover, least = _BIGEARTHNET_HABITATS[number % len(_BIGEARTHNET_HABITATS)]
    for _ in range(_COAST_TRIES if number % 20 == _COAST_TURN else 1):
        lon, lat = find_place(planet, rng, cover, size, least, 0.85 if cover == Cover.SEA_LAKE else 1.0)
        surface = planet.surface(Window(lon, lat, size, 10.0))
        if legends.ocean(surface).any():
            break
    # June 2017 to May 2018, as the source's; clear days.
    days = int(days_since_1970("20170601")) + int(rng.integers(365))
    radar_days = days + int(rng.integers(-3, 4))
    order = [SENSORS["s2_toa"].bands.index(band) for band in _BIGEARTHNET_BANDS]
    s2 = optical.s2_surface(seed, surface, days, scene, rng.uniform(0.85, 1.15))[order].astype(np.uint16)
    s1 = radar.s1_grd(seed, surface, radar_days, scene)

    place = f"{number // 100}_{number % 100}"
    radar_scene = f"S1{'AB'[number % 2]}_IW_GRDH_1SDV_{date_string(radar_days)}T0617{number % 60:02d}"
    optical_scene = f"S2{'AB'[number % 2]}_MSIL2A_{date_string(days)}T1010{number % 60:02d}"
    patches = {
        "S1": f"{radar_scene}/{radar_scene}_{tile_name(lon, lat)}_{place}",
        "S2": f"{optical_scene}/{optical_scene}_{place}",
    }
    files = {kind: f"{patch}/{patch.rpartition('/')[2]}_allbands.tif" for kind, patch in patches.items()}
    for kind, image in (("S1", s1), ("S2", s2)):
        path = root / f"BigEarthNet-{kind}-5%" / files[kind]
        write_tif(path, image, utm_epsg(lon, lat), lon, lat, (10.0, 10.0))
    return [files["S1"], files["S2"], *legends.bigearthnet(surface)]


# ---------------------------------------------------------------- DFC2020

_DFC_HABITATS = (
    (Cover.FOREST, 0.2),
    (Cover.HERBACEOUS, 0.3),
    (Cover.ANNUAL_CROP, 0.2),
    (Cover.RESIDENTIAL, 0.2),
    (Cover.RIVER, 0.06),
    (Cover.BARE, 0.3),
    (Cover.PASTURE, 0.2),
    (Cover.SEA_LAKE, 0.2),
)


def write_dfc2020(planet: Planet, size: int, number: int, root: Path) -> str:
    """One place: Sentinel-1, Sentinel-2, labels, without georeference; returns its line in the split file."""
    seed, scene = planet.seed, 6_000_000 + number
    rng = keyed_rng(seed, "dfc2020", number)
    cover, least = _DFC_HABITATS[number % len(_DFC_HABITATS)]
    lon, lat = find_place(planet, rng, cover, size, least, 0.9)
    surface = planet.surface(Window(lon, lat, size, 10.0))
    days = _YEAR_START + int((200 if lat >= 0 else 17) + rng.normal(0, 45)) % 365
    arrays: dict[str, np.ndarray] = {
        "s1": radar.s1_grd(seed, surface, days, scene).astype(np.float64),
        "s2": optical.s2_toa(seed, surface, days, scene, gain=rng.uniform(0.85, 1.15)).astype(np.uint16),
        "dfc": legends.dfc2020(surface)[None],
    }
    for kind, array in arrays.items():
        write_unplaced_tif(root / kind / f"ROIs0000_test_{kind}_0_p{number}.tif", array, 4326)
    return f"ROIs0000_test_dfc_0_p{number}.tif"
