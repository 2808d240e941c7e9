"""What Sentinel-1 sees of the planet: backscatter of the land cover, its seasons and moisture, terrain, speckle.

Levels are rounded figures in the range reported for C-band ground-range detected images.
"""

from __future__ import annotations

import numpy as np

from copernicus.datasets.miniature.noise import keyed_rng
from copernicus.datasets.miniature.optical import air_temperature, crop_height, greenness
from copernicus.datasets.miniature.planet import Cover, Surface

_LOOKS = 4.4  # of a ground-range detected product at 10 m
_VV_VH_DB = {
    Cover.SEA_LAKE: (-19.5, -27.5),
    Cover.RIVER: (-20.5, -27.0),
    Cover.FOREST: (-9.0, -14.2),
    Cover.HERBACEOUS: (-11.5, -17.8),
    Cover.PASTURE: (-12.0, -19.0),
    Cover.ANNUAL_CROP: (-12.2, -19.4),
    Cover.PERMANENT_CROP: (-10.8, -16.8),
    Cover.RESIDENTIAL: (-6.5, -13.0),
    Cover.INDUSTRIAL: (-4.5, -12.5),
    Cover.HIGHWAY: (-14.5, -21.5),
    Cover.BARE: (-14.5, -24.0),
    Cover.SNOW: (-13.0, -20.5),
}
_LEVELS_2C = np.array([_VV_VH_DB[cover] for cover in Cover], np.float64).T


def backscatter_db(seed: int, surface: Surface, days: float, scene: int, flood: np.ndarray | None = None) -> np.ndarray:
    """(2, H, W) float64, VV and VH in dB, without speckle.

    Args:
        flood: (H, W) bool, where water stands on the day.
    """
    rng = keyed_rng(seed, "s1 scene", scene, int(days))
    wind, soil_moisture = rng.uniform(-2.5, 4.5), rng.normal(0, 0.9)
    level = _LEVELS_2C[:, surface.cover]
    cover = surface.cover
    water = (cover == Cover.SEA_LAKE) | (cover == Cover.RIVER)
    bare = np.isin(cover, (Cover.ANNUAL_CROP, Cover.BARE, Cover.PASTURE, Cover.HERBACEOUS))
    stand = np.where(cover == Cover.ANNUAL_CROP, crop_height(surface, days), 0.0)
    leaf = np.where((cover == Cover.FOREST) | (cover == Cover.PERMANENT_CROP), greenness(surface, days) - 0.5, 0.0)
    parcel = np.where(cover == Cover.ANNUAL_CROP, 2.4 * (surface.parcel - 0.5), 0.0)
    level[0] += -1.5 * stand + parcel + 0.5 * leaf
    level[1] += 4.0 * stand + parcel + 1.2 * leaf
    level += bare * soil_moisture * (1 - 0.6 * stand)
    # Frozen ground and dry snow scatter less.
    level -= np.where(~water & (air_temperature(surface, days) < -3), 2.0, 0.0)
    # Corner reflectors: some buildings face the radar.
    built = (cover == Cover.RESIDENTIAL) | (cover == Cover.INDUSTRIAL)
    level += np.where(built & (surface.plot > 0.86), 7.0, 0.0) - np.where(built & (surface.street > 0), 4.0, 0.0)
    level += np.where(cover == Cover.PERMANENT_CROP, 1.4 * (surface.rows - 0.5), 0.0)
    level += np.where(water, 0.0, 0.7 * surface.fine + 0.5 * surface.broad)
    level += np.where(water, 0.0, np.clip(-6.0 * surface.slope_east, -3.5, 3.5))
    level += np.where(water, wind + 0.6 * surface.broad, 0.0) * np.array([1.0, 0.5])[:, None, None]
    if flood is not None:
        standing = np.array([-20.0, -26.5]) + 0.5 * wind  # shallow and sheltered
        smooth = standing[:, None, None] + 0.4 * surface.broad
        # Between trunks the water doubles the echo instead.
        level = np.where(flood, np.where(cover == Cover.FOREST, level + 2.5, smooth), level)
    return level


def s1_grd(seed: int, surface: Surface, days: float, scene: int, flood: np.ndarray | None = None) -> np.ndarray:
    """(2, H, W) float32, VV and VH in dB with the speckle of a ground-range detected product."""
    rng = keyed_rng(seed, "s1 speckle", scene, int(days))
    level = backscatter_db(seed, surface, days, scene, flood)
    speckle = rng.gamma(_LOOKS, 1 / _LOOKS, level.shape)
    noise_floor = 10 ** np.array([-2.7, -3.1])[:, None, None]
    return (10 * np.log10(10 ** (level / 10) * speckle + noise_floor)).astype(np.float32)
