"""Where benchmark samples lie: a window with enough of a land cover, or a cell of the grid of a sample's own."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import uniform_filter

from copernicus.datasets.miniature.planet import Cover, Planet, Wide, Window
from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import grid_center

_STEP = 997
_GRIDS = 721 * 1440


def ground_temperature(wide: Wide) -> np.ndarray:
    """Annual mean, degrees C."""
    return wide.temperature - 0.0062 * np.maximum(wide.elevation, 0)


def _habitat(cover: Cover, wide: Wide) -> np.ndarray:
    """Where to look for a land cover, as bool of the points."""
    land = wide.elevation > 2
    ground_t = wide.temperature - 0.0062 * wide.elevation
    mild = land & (ground_t > -1)
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
        Cover.BARE: land & ((wide.moisture < 0.22) | (ground_t < -5)) & (ground_t > -9),
        Cover.SNOW: land & (ground_t < -9),
    }[cover]


def random_points(rng: np.random.Generator, count: int, max_lat: float = 62) -> tuple[np.ndarray, np.ndarray]:
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
        lon, lat = random_points(rng, 256)
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


def own_cells(planet: Planet, number: int, max_lat: float = 66) -> tuple[np.ndarray, Wide]:
    """Cells of the 0.25-degree grid that no other sample of a task can take, so that names do not meet: every 997th.

    Returns:
        Their numbers (N,) and the wide fields at their centres (N,).
    """
    assert 0 <= number < _STEP, f"sample {number}: only {_STEP} have cells of their own"
    cells = np.arange(number, _GRIDS, _STEP)
    lon, lat = np.array([grid_center(int(cell)) for cell in cells]).T
    inside = np.abs(lat) <= max_lat
    return cells[inside], planet.wide(lon[inside], lat[inside])
