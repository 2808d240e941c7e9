"""Benchmark tasks that ask Sentinel-3 OLCI for what covers a region, on one to four dates: LC100 and biomass.

The planet is looked up every 100 m, which is a label's pixel; a pixel of the image is the mean of nine. Images are in
degrees, as published, but their pixels are square in metres: wider in degrees than those of the source towards the
poles.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from copernicus.datasets.miniature import legends, optical
from copernicus.datasets.miniature.noise import keyed_rng
from copernicus.datasets.miniature.places import ground_temperature, own_cells
from copernicus.datasets.miniature.planet import METRES_PER_DEGREE, Planet, Surface, Wide, Window
from copernicus.datasets.miniature.raster import write_tif
from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import date_string, days_since_1970, grid_center, grid_name

_FINE_M = 100.0
_RATIO = 3  # pixels of 100 m in one of 300 m, a side

Wanted = Callable[[Wide], np.ndarray]


def _climate(low: float, high: float, field: str | None = None, least: float = 0.0) -> Wanted:
    """Land of that annual temperature, where a field is above some level."""

    def wanted(wide: Wide) -> np.ndarray:
        ground_t = ground_temperature(wide)
        here = (wide.elevation > 5) & (ground_t > low) & (ground_t <= high)
        return here & (getattr(wide, field) > least) if field else here

    return wanted


def _coast(wide: Wide) -> np.ndarray:
    return (wide.elevation > -200) & (wide.elevation < 40)


def _desert(wide: Wide) -> np.ndarray:
    return (wide.elevation > 5) & (wide.moisture < 0.24)


_LC100_HABITATS: tuple[Wanted, ...] = (
    _climate(2, 16, "farm", 0.5),
    _climate(-4, 4, "wood", 0.3),
    _climate(4, 30, "urban", 1.0),
    _desert,
    _climate(17, 40, "wood", 0.3),
    _climate(-30, -4),
    _coast,
    _climate(4, 16, "wood", 0.3),
    _climate(-4, 40),
)
_BIOMASS_HABITATS: tuple[Wanted, ...] = (
    _climate(17, 40, "wood", 0.5),
    _climate(4, 16, "wood", 0.5),
    _climate(-5, 4, "wood", 0.3),
    _climate(2, 30),
)


def _cell(planet: Planet, rng: np.random.Generator, number: int, habitats: tuple[Wanted, ...]) -> int:
    """The number of a grid cell of the sample's own, in the habitat whose turn it is, or else anywhere on land."""
    cells, wide = own_cells(planet, number)
    for wanted in (habitats[number % len(habitats)], _climate(-40, 40)):
        found = cells[wanted(wide)]
        if len(found):
            return int(rng.choice(found))
    raise InputError(f"miniature: the planet of seed {planet.seed} has too little land; try another seed")


def _write_images(
    planet: Planet, surface: Surface, rng: np.random.Generator, year: int, scene: int, folder: Path
) -> str:
    """One to four dates of a year; returns the name of the clearest."""
    count = int(rng.integers(1, 5))
    first = int(days_since_1970(f"{year}0101"))
    clearest, least = "", np.inf
    for part, position in enumerate(rng.uniform(0.05, 0.95, count)):
        days = first + int((part + position) * 365 / count)
        cover = float(np.clip(rng.uniform(-0.6, 0.45), 0, 1))
        above = optical.sky(planet.seed, surface.window, days, cover, scene)
        fine = optical.s3_olci(planet.seed, surface, days, scene, above)
        size = fine.shape[1] // _RATIO
        image = fine.reshape(-1, size, _RATIO, size, _RATIO).mean(axis=(2, 4))
        second = int(rng.integers(52))
        name = f"S3A_{date_string(days)}T1357{second:02d}_{date_string(days)}T1357{second + 8:02d}.tif"
        _write(folder / name, image, surface.window, _RATIO)
        if above.cloud.mean() < least:
            clearest, least = name, float(above.cloud.mean())
    return clearest


def _write(path: Path, array_CHW: np.ndarray, window: Window, ratio: int) -> None:
    metres = _FINE_M * ratio
    pixel = metres / window.metres_per_degree_lon, metres / METRES_PER_DEGREE
    write_tif(path, array_CHW, 4326, window.lon, window.lat, pixel)


# ---------------------------------------------------------------- LC100

LC100_LEAST = 0.02
"""Share of the label's pixels from which a class counts as present."""


def write_lc100(planet: Planet, size: int, number: int, root: Path) -> tuple[str, str, list[int]]:
    """One cell; returns its name, its image of the static mode, and which classes it holds (23 numbers, 0 or 1)."""
    scene = 8_000_000 + number
    rng = keyed_rng(planet.seed, "lc100", number)
    cell = _cell(planet, rng, number, _LC100_HABITATS)
    surface = planet.surface(Window(*grid_center(cell), size * _RATIO, _FINE_M))
    name = grid_name(cell)
    static = _write_images(planet, surface, rng, 2019, scene, root / "s3_olci" / name)
    label = legends.lc100(surface)
    _write(root / "lc100" / f"{name}.tif", label[None], surface.window, 1)
    return name, static, [int(np.mean(label == code) >= LC100_LEAST) for code in legends.LC100_CODES]


# ---------------------------------------------------------------- Biomass


def biomass_name(lon: float, lat: float) -> str:
    """As the source's maps are cut: the 10-degree tile by its upper left corner, then row and column in it, of 40."""
    left, top = int(np.floor(lon / 10)) * 10, int(np.ceil(lat / 10)) * 10
    row, column = round((top - lat) / 0.25), round((lon - left) / 0.25)
    tile = f"{'N' if top >= 0 else 'S'}{abs(top):02d}{'E' if left >= 0 else 'W'}{abs(left):03d}"
    return f"{tile}_ESACCI-BIOMASS-L4-AGB-MERGED-100m-2020-fv4.0_{row:02d}_{column:02d}"


def write_biomass(planet: Planet, size: int, number: int, root: Path) -> tuple[str, str]:
    """One cell, wooded mostly; returns its name and its image of the static mode."""
    scene = 9_000_000 + number
    rng = keyed_rng(planet.seed, "biomass", number)
    cell = _cell(planet, rng, number, _BIOMASS_HABITATS)
    lon, lat = grid_center(cell)
    surface = planet.surface(Window(lon, lat, size * _RATIO, _FINE_M))
    name = biomass_name(lon, lat)
    static = _write_images(planet, surface, rng, 2020, scene, root / "s3_olci" / name)
    _write(root / "biomass" / f"{name}.tif", legends.biomass(planet.seed, surface)[None], surface.window, 1)
    return name, static
