"""The planet's ground in the words of other maps: CORINE-like classes, Copernicus Global Land Cover, the classes of
DFC2020, tonnes of biomass.

All are read off the fields that the sensors see too, so that they can be learnt: land cover, climate, how much of a
canopy is evergreen, low ground by the water. What a map's definition asks of heights or species, which the planet does
not have, is replaced by climate (LC100's trees that keep their leaves are those of places without winter).
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import distance_transform_edt, gaussian_filter, uniform_filter

from copernicus.datasets.miniature.noise import plane_noise, stream
from copernicus.datasets.miniature.planet import Cover, Surface

_ORCHARD = 0.45  # of an orchard's ground is below trees


def _without_roads(surface: Surface) -> np.ndarray:
    """(H, W) cover with highways given to what lies beside them: too narrow for the maps that leave them out."""
    road = surface.cover == Cover.HIGHWAY
    if not road.any() or road.all():
        return surface.cover
    row, column = distance_transform_edt(road, return_distances=False, return_indices=True)
    return surface.cover[row, column]


def ocean(surface: Surface) -> np.ndarray:
    """(H, W) bool: the sea. Lakes lie higher."""
    return (surface.cover == Cover.SEA_LAKE) & (surface.elevation == 0)


def _wet(surface: Surface, cover: np.ndarray) -> np.ndarray:
    """Grass on low ground by the water, in moist country that is not frozen."""
    grass = (cover == Cover.HERBACEOUS) | (cover == Cover.PASTURE)
    return grass & (surface.drainage < 1.0) & (surface.moisture > 0.5) & (surface.temperature > -3)


def _dry(surface: Surface) -> np.ndarray:
    return surface.moisture + 0.02 * surface.broad < 0.36


NEEDLES_EVERGREEN, LEAVES_EVERGREEN, NEEDLES_SHED, LEAVES_SHED, MIXED_TREES = range(1, 6)


def tree_kinds(surface: Surface) -> np.ndarray:
    """(H, W) uint8: which trees would grow here, in LC100's order (1 evergreen needles .. 5 mixed)."""
    no_winter = surface.temperature - surface.season > 12
    kinds = np.full(surface.cover.shape, MIXED_TREES, np.uint8)
    few_evergreen = surface.evergreen < 0.42
    kinds[few_evergreen & no_winter] = LEAVES_EVERGREEN
    kinds[few_evergreen & ~no_winter] = LEAVES_SHED
    kinds[surface.evergreen > 0.6] = NEEDLES_EVERGREEN
    kinds[(surface.temperature < -1) & (surface.evergreen < 0.65)] = NEEDLES_SHED  # larches
    return kinds


# ---------------------------------------------------------------- Copernicus Global Land Cover, 100 m

LC100_CODES = (0, 20, 30, 40, 50, 60, 70, 80, 90, 100, *range(111, 117), *range(121, 127), 200)


def _tree_share(cover: np.ndarray, pixels: float) -> np.ndarray:
    trees = (cover == Cover.FOREST) + _ORCHARD * (cover == Cover.PERMANENT_CROP)
    return gaussian_filter(trees, pixels, mode="nearest")


def lc100(surface: Surface) -> np.ndarray:
    """(H, W) uint8: codes of the discrete classification, for pixels of about 100 m. 0 (unknown) does not occur.

    Forest is closed (111..116) where trees cover more than 70 % around, open (121..126) below that; orchards are
    forest of no type that is defined (116, 126).
    """
    cover = _without_roads(surface)
    code = np.full(cover.shape, 30, np.uint8)
    code[(cover == Cover.HERBACEOUS) & _dry(surface)] = 20
    code[(cover == Cover.HERBACEOUS) & (surface.temperature < 0)] = 100
    code[_wet(surface, cover)] = 90
    code[cover == Cover.ANNUAL_CROP] = 40
    code[np.isin(cover, (Cover.RESIDENTIAL, Cover.INDUSTRIAL))] = 50
    code[cover == Cover.BARE] = 60
    code[cover == Cover.SNOW] = 70
    code[np.isin(cover, (Cover.RIVER, Cover.SEA_LAKE))] = 80
    code[ocean(surface)] = 200
    closed = _tree_share(cover, 1.5) > 0.7
    forest, orchard = cover == Cover.FOREST, cover == Cover.PERMANENT_CROP
    kinds = np.where(orchard, 6, tree_kinds(surface))
    code[forest | orchard] = (np.where(closed, 110, 120) + kinds)[forest | orchard]
    return code


def biomass(seed: int, surface: Surface) -> np.ndarray:
    """(H, W) uint16: above-ground biomass, t/ha, for pixels of about 100 m.

    What grows follows warmth and moisture, less of it where needles stand; denser canopies, which look darker, hold
    more. The age of a stand is seen by no sensor: it moves the value by a fifth.
    """
    cover = _without_roads(surface)
    warmth = 1 / (1 + np.exp(-(surface.temperature - 9) / 4.5))
    potential = 35 + 330 * warmth * np.clip(1.7 * surface.moisture - 0.35, 0.08, 1)
    stand = potential * (1.15 - 0.45 * surface.evergreen) * (1 + 0.12 * np.clip(surface.fine, -2, 2))
    east, north = surface.window.east_m, surface.window.north_m
    age = np.exp(0.18 * plane_noise(stream(seed, "stand age"), east, north, 1500, 2))
    shrubs = np.where(cover == Cover.HERBACEOUS, 12 * np.clip(surface.moisture * 2, 0.2, 1.5), 0.0)
    shrubs = np.where(np.isin(cover, (Cover.PASTURE, Cover.RESIDENTIAL)), 5.0, shrubs)
    trees = (cover == Cover.FOREST) + 0.5 * _ORCHARD * (cover == Cover.PERMANENT_CROP)
    tonnes = gaussian_filter(trees * stand * age + shrubs, 0.6, mode="nearest")
    water = np.isin(cover, (Cover.SEA_LAKE, Cover.RIVER))
    return np.where(water, 0, np.rint(tonnes)).astype(np.uint16)


# ---------------------------------------------------------------- DFC2020, 10 m


def dfc2020(surface: Surface) -> np.ndarray:
    """(H, W) int32: 1 forest, 2 shrubland, 3 savanna, 4 grassland, 5 wetland, 6 cropland, 7 urban, 8 snow, 9 barren,
    10 water; for pixels of 10 m. 0 (background) does not occur.

    Shrubland is herbaceous cover where shrubs, which the canopy's texture shows, stand close; savanna is warm grassland
    with trees.
    """
    cover = surface.cover
    code = np.full(cover.shape, 4, np.int32)
    grass = cover == Cover.HERBACEOUS
    trees = uniform_filter((cover == Cover.FOREST).astype(np.float64), 15, mode="nearest")
    code[grass & (trees > 0.15) & (trees < 0.6) & (surface.temperature > 18)] = 3
    code[grass & (gaussian_filter(surface.fine, 1.5, mode="nearest") > 0.35)] = 2
    code[_wet(surface, cover)] = 5
    code[cover == Cover.FOREST] = 1
    code[np.isin(cover, (Cover.ANNUAL_CROP, Cover.PERMANENT_CROP))] = 6
    code[np.isin(cover, (Cover.RESIDENTIAL, Cover.INDUSTRIAL, Cover.HIGHWAY))] = 7
    code[cover == Cover.SNOW] = 8
    code[cover == Cover.BARE] = 9
    code[np.isin(cover, (Cover.SEA_LAKE, Cover.RIVER))] = 10
    return code


# ---------------------------------------------------------------- CORINE, as BigEarthNet groups it

_PRESENT = 0.05  # of a patch; narrower things, rivers, count from a third of that


def bigearthnet(surface: Surface) -> list[int]:
    """19 numbers, 0 or 1: which classes a patch holds."""
    cover = _without_roads(surface)
    forest, grass, bare = cover == Cover.FOREST, cover == Cover.HERBACEOUS, cover == Cover.BARE
    crops = [cover == kind for kind in (Cover.ANNUAL_CROP, Cover.PERMANENT_CROP, Cover.PASTURE)]
    farmed, natural = np.mean(crops[0] | crops[1] | crops[2]), np.mean(forest | grass)
    kinds = tree_kinds(surface)
    wet, sea = _wet(surface, cover), ocean(surface)
    by_the_sea = np.mean(sea) > 0.02
    shrubby = grass & ~wet & (gaussian_filter(surface.fine, 3.0, mode="nearest") > 0.25)
    dry = grass & ~wet & ~shrubby & (_dry(surface) | (surface.temperature < 4))
    hot = surface.temperature > 12
    inland = np.isin(cover, (Cover.RIVER, Cover.SEA_LAKE)) & ~sea
    shares = (
        cover == Cover.RESIDENTIAL,
        cover == Cover.INDUSTRIAL,
        *crops,
        # Parcels of several kinds beside each other; farmland among wild land; scattered trees over warm farmland.
        min(float(np.mean(crop)) for crop in crops) / 2,
        0.5 * min(farmed, natural) - 0.05,
        0.7 * np.mean(forest & hot) if farmed > 0.5 and np.mean(forest) < 0.3 else 0.0,
        forest & np.isin(kinds, (LEAVES_EVERGREEN, LEAVES_SHED)),
        forest & np.isin(kinds, (NEEDLES_EVERGREEN, NEEDLES_SHED)),
        forest & (kinds == MIXED_TREES),
        (grass & ~wet & ~shrubby & ~dry) | (bare & ~hot),
        dry,
        shrubby,
        bare & hot,
        0.0 if by_the_sea else wet,
        wet if by_the_sea else 0.0,
        3 * np.mean(inland),
        sea,
    )
    return [int(np.mean(share) >= _PRESENT) for share in shares]
