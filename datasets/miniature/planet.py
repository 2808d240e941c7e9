"""The miniature planet: terrain, climate, land cover and their texture, as functions of (seed, longitude, latitude).

Structure wider than about 10 km is noise on the sphere. Finer structure (relief, rivers, roads, parcels, houses) is
noise on a plane whose metres east and north are counted along the 0.25-degree row of the grid that the window's centre
belongs to: one pattern for all windows of a row, whatever their pixel size, with seams between rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

import numpy as np

from copernicus.datasets.miniature.noise import (
    EARTH_RADIUS_KM,
    hash_unit,
    plane_noise,
    sphere_noise,
    spline_matrix,
    stream,
)

METRES_PER_DEGREE = 111_320.0
_EUROPE = np.array([np.cos(0.88) * np.cos(0.2), np.cos(0.88) * np.sin(0.2), np.sin(0.88)])  # 50.4 N, 11.5 E
_NODE_SPACING_M = 3000.0  # of the wide fields in a window; their shortest wavelength is about 11 km


class Cover(IntEnum):
    """Land cover at 10 m."""

    SEA_LAKE = 0
    RIVER = 1
    FOREST = 2
    HERBACEOUS = 3
    PASTURE = 4
    ANNUAL_CROP = 5
    PERMANENT_CROP = 6
    RESIDENTIAL = 7
    INDUSTRIAL = 8
    HIGHWAY = 9
    BARE = 10
    SNOW = 11


@dataclass(frozen=True)
class Window:
    """A square raster, north up, row 0 in the north: centre in degrees, pixels a side, pixel size in metres."""

    lon: float
    lat: float
    size: int
    gsd_m: float

    @cached_property
    def reference_lat(self) -> float:
        return round(self.lat * 4) / 4

    @property
    def metres_per_degree_lon(self) -> float:
        return METRES_PER_DEGREE * float(np.cos(np.radians(self.reference_lat)))

    @cached_property
    def offset_m(self) -> np.ndarray:
        """(size,) pixel centres from the window's centre, ascending."""
        return (np.arange(self.size) - (self.size - 1) / 2) * self.gsd_m

    @cached_property
    def east_m(self) -> np.ndarray:
        """(size,) of the columns, from the prime meridian along the row of the grid."""
        return self.lon * self.metres_per_degree_lon + self.offset_m

    @cached_property
    def north_m(self) -> np.ndarray:
        """(size,) of the rows, from the equator."""
        return self.lat * METRES_PER_DEGREE - self.offset_m

    @property
    def lons(self) -> np.ndarray:
        return self.east_m / self.metres_per_degree_lon

    @property
    def lats(self) -> np.ndarray:
        return self.north_m / METRES_PER_DEGREE


@dataclass(frozen=True)
class Wide:
    """The wide fields at some points, arrays of one shape."""

    elevation: np.ndarray  # metres, below 0 in the sea, without the fine relief
    rugged: np.ndarray  # 0 plain .. 1 mountains
    temperature: np.ndarray  # annual mean at sea level, degrees C
    season: np.ndarray  # half the range between winter and summer, degrees C
    moisture: np.ndarray  # 0 desert .. 1 rain forest
    urban: np.ndarray  # about -3..3; built up above 1.2
    industry: np.ndarray  # about -3..3; industry in cities above
    farm: np.ndarray  # about -3..3; farmed above 0
    wood: np.ndarray  # about -3..3; wooded above


@dataclass(frozen=True)
class Surface:
    """A window's ground, which does not change with time. Arrays are (H, W)."""

    window: Window
    cover: np.ndarray  # uint8 of Cover
    elevation: np.ndarray  # metres; 0 on the sea
    slope_east: np.ndarray  # rise over run
    slope_north: np.ndarray
    temperature: np.ndarray  # annual mean at the ground, degrees C
    season: np.ndarray
    moisture: np.ndarray
    emission: np.ndarray  # 0..about 3: cities' and industry's, for the atmosphere
    evergreen: np.ndarray  # share of the canopy, 0..1
    parcel: np.ndarray  # a number in 0..1 that the parcel shares, for what grows there and when
    rows: np.ndarray  # 0 or 1: tree rows of permanent crops
    plot: np.ndarray  # a number in 0..1 for each building plot
    street: np.ndarray  # 1 on streets
    fine: np.ndarray  # unit variance, 120 m and finer: canopy, shrubs
    broad: np.ndarray  # unit variance, 900 m and finer: soils
    drainage: np.ndarray  # how far above the nearest water, about 0..30; low land floods first


@dataclass(frozen=True)
class _Terrain:
    wide: Wide
    height: np.ndarray  # metres, below 0 in the sea
    elevation: np.ndarray  # metres, 0 on the sea
    river: np.ndarray
    sea: np.ndarray
    drainage: np.ndarray


class Planet:
    """The planet of a seed. Methods are pure."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _key(self, purpose: str) -> int:
        return stream(self.seed, purpose)

    def wide(self, lon: np.ndarray, lat: np.ndarray) -> Wide:
        """The wide fields at points given in degrees, arrays of any one shape."""
        shape = np.shape(lon)
        lam, phi = np.radians(np.ravel(lon)), np.radians(np.ravel(lat))
        unit_N3 = np.stack([np.cos(phi) * np.cos(lam), np.cos(phi) * np.sin(lam), np.sin(phi)], axis=-1)

        def noise(
            purpose: str, wavelength_km: float, octaves: int, gain: float = 0.5, ridged: bool = False
        ) -> np.ndarray:
            return sphere_noise(self._key(purpose), unit_N3, wavelength_km, octaves, gain, ridged)

        continent = noise("continent", 7000, 9, 0.55)
        # Every planet has a continent where Europe is, for maps of air quality are in Europe's projection.
        from_europe_km = EARTH_RADIUS_KM * np.arccos(np.clip(unit_N3 @ _EUROPE, -1, 1))
        europe = np.exp(-((from_europe_km / 2200) ** 2))
        continent = continent * (1 - 0.75 * europe) + 0.6 * europe
        rugged = np.clip(noise("mountains", 1800, 6, ridged=True) * 2.6 - 0.75, 0, 1) * np.clip(continent * 2, 0, 1)
        land = 90 * np.clip(continent * 8, -1, 1) + 420 * np.maximum(continent, 0) ** 1.5
        elevation = np.where(continent > 0, land + 2600 * rugged**1.4, -3000 * np.tanh(-continent * 1.5))
        belts = 0.5 + 0.22 * np.cos(6 * phi) - 0.1 * np.cos(2 * phi) ** 8
        moisture = np.clip(belts + 0.2 * noise("moisture", 2500, 6), 0, 1)
        sea_level_t = 27.5 - 30 * np.sin(phi) ** 2 - 18 * np.sin(phi) ** 6 + 2 * noise("temperature", 3000, 4)
        season = 1 + 17 * np.abs(np.sin(phi)) * np.clip(0.6 + 0.3 * continent, 0.4, 1.2)
        ground_t = sea_level_t - 0.0062 * np.maximum(elevation, 0)
        comfort = (
            np.clip((ground_t - 1) / 5, 0, 1) * np.clip(moisture * 5 - 0.7, 0, 1) * np.clip(1.3 - rugged * 1.6, 0, 1)
        )
        comfort = comfort * (elevation > -50)
        urban = noise("urban", 110, 4, 0.6) - 4 * (1 - comfort)
        farm = 0.7 + noise("farm", 70, 3) - 5 * (1 - comfort) - 3 * np.clip((ground_t - 24) / 4, 0, 1)
        wood = noise("wood", 60, 3) + 6 * (moisture - 0.52) - 4 * np.clip((-2 - ground_t) / 4, 0, 1.5)
        fields = (elevation, rugged, sea_level_t, season, moisture, urban, noise("industry", 45, 2), farm, wood)
        return Wide(*(field.reshape(shape) for field in fields))

    def _wide_raster(self, window: Window) -> Wide:
        """Evaluated at a few nodes and interpolated: the wide fields are smooth at the scale of a window."""
        extent = (window.size - 1) * window.gsd_m
        nodes = 1 if window.size == 1 else max(3, int(np.ceil(extent / _NODE_SPACING_M)) + 1)
        at = np.linspace(-extent / 2, extent / 2, nodes)
        lons = window.lon + at / window.metres_per_degree_lon
        lats = np.clip(window.lat - at / METRES_PER_DEGREE, -90, 90)
        wide = self.wide(*np.meshgrid(lons, lats))
        weights = spline_matrix(nodes, window.size)
        return Wide(*(weights @ field @ weights.T for field in vars(wide).values()))

    def _noise(self, window: Window) -> Callable[..., np.ndarray]:
        def noise(purpose: str, wavelength_m: float, octaves: int, gain: float = 0.5) -> np.ndarray:
            return plane_noise(self._key(purpose), window.east_m, window.north_m, wavelength_m, octaves, gain)

        return noise

    def _terrain(self, window: Window) -> _Terrain:
        wide, noise = self._wide_raster(window), self._noise(window)
        bed = np.abs(noise("river", 5200, 3, 0.4)) * 850  # metres from the river's middle line, about
        half_width = np.clip(26 + 16 * noise("river width", 9000, 1), 10, 80)
        has_river = (wide.moisture > 0.28) & (wide.rugged < 0.65) & (wide.temperature > -4)
        relief = noise("relief", 11000, 7, 0.52)
        valley = 1 - np.exp(-((bed / 700) ** 2))
        height = wide.elevation + (10 + 420 * wide.rugged) * relief + (18 * valley - 9) * has_river
        sea = height <= 0
        river = has_river & (bed < half_width) & ~sea
        elevation = np.where(sea, 0.0, np.where(river, height - 2, height))
        distance = np.where(has_river, bed / 90, 20.0)
        return _Terrain(wide, height, elevation, river, sea, distance + 1.5 * relief + 3 * wide.rugged)

    def elevation(self, window: Window) -> np.ndarray:
        """(H, W) float32 metres, 0 on the sea."""
        return self._terrain(window).elevation.astype(np.float32)

    def surface(self, window: Window) -> Surface:
        """The ground of a window."""
        terrain, noise = self._terrain(window), self._noise(window)
        wide, elevation = terrain.wide, terrain.elevation
        slope_north = slope_east = np.zeros_like(elevation)
        if window.size > 1:
            slope_south, slope_east = np.gradient(elevation, window.gsd_m)
            slope_north = -slope_south
        temperature = wide.temperature - 0.0062 * np.maximum(elevation, 0)

        broad, fine = noise("broad", 900, 3), noise("fine", 120, 3, 0.7)
        parcel, edge, rows, plot, street = self._parcels(window)
        cover = self._cover(wide, noise, temperature, broad, fine, parcel, edge)
        road = self._roads(window, noise) & (wide.urban > -0.9) & (wide.rugged < 0.6) & (temperature > -2)
        cover[road] = Cover.HIGHWAY
        cover[terrain.river & ~road] = Cover.RIVER
        # Lakes sit in the plains of moist country.
        lake = (noise("lake", 3600, 4) > 2.35 - 0.9 * wide.moisture + 4 * wide.rugged) & (wide.moisture > 0.3)
        cover[lake | terrain.sea] = Cover.SEA_LAKE
        city = np.clip(wide.urban - 0.6, 0, 3)
        return Surface(
            window=window,
            cover=cover,
            elevation=elevation.astype(np.float32),
            slope_east=slope_east,
            slope_north=slope_north,
            temperature=temperature,
            season=wide.season,
            moisture=wide.moisture,
            emission=city**1.5 * (1 + 0.5 * np.clip(wide.industry, 0, 2)) * (terrain.height > -20),
            evergreen=np.clip(0.5 + 0.2 * broad + np.where(temperature < 6, 0.35, -0.15), 0, 1),
            parcel=parcel,
            rows=rows,
            plot=plot,
            street=street,
            fine=fine,
            broad=broad,
            drainage=np.where(lake, 0.0, terrain.drainage),
        )

    def _roads(self, window: Window, noise) -> np.ndarray:
        """Two families of gently winding highways; some of each are missing."""
        east, north = np.meshgrid(window.east_m, window.north_m)
        wind = 260 * noise("road wind", 5000, 2)
        road = np.zeros((window.size, window.size), bool)
        for family, (angle, spacing) in enumerate(((0.45, 2300.0), (1.93, 3100.0))):
            across = east * np.cos(angle) + north * np.sin(angle) + wind * (1 if family else -1)
            number = np.floor(across / spacing)
            from_middle = np.abs(across / spacing - number - 0.5) * spacing
            built = hash_unit(self._key("road") + family, number) < 0.65
            road |= (from_middle < 19) & built
        return road

    def _parcels(self, window: Window) -> tuple[np.ndarray, ...]:
        """Fields in a brick pattern whose direction changes from block to block of 2.4 km; plots and streets."""
        east, north = np.meshgrid(window.east_m, window.north_m)
        block_e, block_n = np.floor(east / 2400), np.floor(north / 2400)
        angle = np.pi * hash_unit(self._key("parcel angle"), block_e, block_n)
        across = east * np.cos(angle) + north * np.sin(angle)
        along = -east * np.sin(angle) + north * np.cos(angle)
        width = 110 + 190 * hash_unit(self._key("parcel width"), block_e, block_n)
        strip = np.floor(across / width)
        length = width * 1.9
        position = along / length + hash_unit(self._key("parcel shift"), strip, block_e, block_n)
        number = np.floor(position)
        parcel = hash_unit(self._key("parcel"), strip, number, block_e * 4099 + block_n)
        edge = np.minimum(across - strip * width, (position - number) * length) < 11
        rows = (np.floor(across / 20).astype(np.int64) & 1).astype(np.float64)
        plot_m = 24.0
        plot_a, plot_b = np.floor(across / plot_m).astype(np.int64), np.floor(along / plot_m).astype(np.int64)
        plot = hash_unit(self._key("plot"), plot_a, plot_b)
        street = ((plot_a % 4 == 0) | (plot_b % 6 == 0)).astype(np.float64)
        return parcel, edge, rows, plot, street

    @staticmethod
    def _cover(wide: Wide, noise, temperature, broad, fine, parcel, edge) -> np.ndarray:
        """Everything but water and highways."""
        cover = np.full(parcel.shape, Cover.HERBACEOUS, np.uint8)
        cover[wide.wood + 0.8 * broad + 0.25 * fine > 0.35] = Cover.FOREST
        cover[(wide.moisture + 0.05 * broad < 0.22) | (temperature + broad < -5)] = Cover.BARE
        farmed = wide.farm + 0.5 * noise("farm edge", 2600, 2) > 0.25
        # What grows follows the climate; within it, the parcel's number decides.
        pasture_share = np.clip(0.25 + 0.9 * (wide.moisture - 0.45) + 0.02 * (12 - temperature), 0.1, 0.6)
        permanent_share = np.clip(0.08 + 0.02 * (temperature - 8), 0.03, 0.3)
        draw = (parcel * 7.13) % 1.0
        crop = np.where(draw < pasture_share, Cover.PASTURE, Cover.ANNUAL_CROP)
        crop = np.where(draw > 1 - permanent_share, Cover.PERMANENT_CROP, crop)
        idle = (parcel * 31.7) % 1.0
        crop = np.where(idle < 0.06, Cover.HERBACEOUS, np.where(idle > 0.95, Cover.FOREST, crop))
        crop = np.where(edge & (crop == Cover.PASTURE), Cover.FOREST, crop)  # hedges
        cover[farmed] = crop[farmed]
        built = wide.urban + 0.45 * noise("suburb", 1500, 3) > 1.15
        industrial = wide.industry * 0.6 + noise("works", 1900, 2) > 0.75
        cover[built] = np.where(industrial, Cover.INDUSTRIAL, Cover.RESIDENTIAL)[built]
        cover[temperature + 0.6 * broad < -9] = Cover.SNOW
        return cover
