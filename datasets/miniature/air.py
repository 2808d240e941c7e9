"""What Sentinel-5P sees of the planet: columns of four gases over cities, forests and seasons; and two at the ground.

Columns are in the range of the monthly level-3 products, mol m-2.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.ndimage import gaussian_filter, shift

from copernicus.datasets.miniature.noise import keyed_rng, plane_noise, stream
from copernicus.datasets.miniature.optical import air_temperature, day_of_year, greenness
from copernicus.datasets.miniature.planet import Cover, Surface, Window

Gas = Literal["s5p_co", "s5p_no2", "s5p_o3", "s5p_so2"]
GASES: tuple[Gas, ...] = ("s5p_co", "s5p_no2", "s5p_o3", "s5p_so2")


def plume(seed: int, surface: Surface, days: float) -> np.ndarray:
    """(H, W) what the wind of a month makes of the emissions: drawn out downwind, smooth."""
    rng = keyed_rng(
        seed, "wind", int(days) // 28, round(surface.window.lat * 4) + 400, round(surface.window.lon * 4) + 800
    )
    km = surface.window.gsd_m / 1000
    wind = rng.normal(0, 2.0, 2) / km
    near = gaussian_filter(surface.emission, 1.6 / km, mode="nearest")
    far = gaussian_filter(shift(surface.emission, wind, order=1, mode="nearest"), 5.0 / km, mode="nearest")
    return 0.55 * near + 0.45 * far


def _weather(seed: int, gas: Gas, window: Window, days: float) -> np.ndarray:
    """(H, W) unit variance: what a month's weather does to a gas."""
    return plane_noise(stream(seed, f"weather {gas} {int(days)}"), window.east_m, window.north_m, 90_000, 3, 0.6)


def column(seed: int, gas: Gas, surface: Surface, days: float, scene: int) -> np.ndarray:
    """(1, H, W) float32, mol m-2, monthly mean; NaN where clouds or snow left no retrieval."""
    rng = keyed_rng(seed, gas, scene, int(days))
    window = surface.window
    noise = rng.normal(size=surface.cover.shape)
    north = 1 if window.lat >= 0 else -1
    winter = np.cos(2 * np.pi * (day_of_year(days) - 15) / 365.25) * north
    thin = np.exp(-surface.elevation / 8000)  # less air above high ground
    wave = _weather(seed, gas, window, days)
    if gas == "s5p_no2":
        land = surface.cover != Cover.SEA_LAKE
        value = 1.2e-5 + 6e-6 * land + 7.5e-5 * (1 + 0.45 * winter) * plume(seed, surface, days)
        value = value * (1 + 0.08 * wave) + 3e-6 * noise
    elif gas == "s5p_co":
        smoke = np.clip(0.6 - greenness(surface, days), 0, 1) * (surface.temperature > 18) * (surface.moisture > 0.3)
        value = (0.031 + 0.002 * winter + 0.0035 * plume(seed, surface, days) + 0.006 * smoke + 0.001 * wave) * thin
        value = value + 0.0006 * noise
    elif gas == "s5p_o3":
        phi = np.radians(window.lat)
        spring = np.cos(2 * np.pi * (day_of_year(days) - 90) / 365.25) * north
        value = 0.118 + 0.04 * np.sin(phi) ** 2 * (1 + 0.5 * spring) + 0.004 * wave
        value = value * (0.97 + 0.03 * thin) + 0.0007 * noise
    else:
        works = np.where(surface.cover == Cover.INDUSTRIAL, 1.0, 0.0)
        value = 4e-5 + 2.2e-4 * works * np.clip(surface.emission, 0, 3) + 3e-5 * wave + 1.1e-4 * noise
    smoothed = gaussian_filter(value, 0.7 * 1000 / window.gsd_m)
    gaps = plane_noise(stream(seed, f"gaps {scene} {int(days)}"), window.east_m, window.north_m, 12_000, 3)
    lost = gaps + 0.08 * np.clip(-air_temperature(surface, days), 0, 10) > rng.uniform(1.6, 3.2)
    return np.where(lost, np.nan, smoothed).astype(np.float32)[None]


def mean_column(columns: list[np.ndarray]) -> np.ndarray:
    """(1, H, W) float32: the mean of months, of what was retrieved in them; NaN where nothing was."""
    months = np.stack(columns)
    seen = np.isfinite(months)
    total = np.where(seen, months, 0).sum(axis=0, dtype=np.float64)
    return np.where(seen.any(axis=0), total / np.maximum(seen.sum(axis=0), 1), np.nan).astype(np.float32)


def surface_no2(seed: int, surface: Surface) -> np.ndarray:
    """(H, W) float32: annual mean NO2 at the ground, micrograms m-3.

    It shares the emissions with the column, but it stays nearer to them, gathers in valleys and in cold, still air, and
    follows roads, none of which the column shows.
    """
    km = surface.window.gsd_m / 1000
    near = gaussian_filter(surface.emission, 1.0 / km, mode="nearest")
    traffic = gaussian_filter((surface.cover == Cover.HIGHWAY).astype(np.float64), 1.5 / km, mode="nearest")
    terrain = surface.elevation - gaussian_filter(surface.elevation.astype(np.float64), 8.0 / km, mode="nearest")
    still = 1 + 0.5 * np.tanh(-terrain / 40) + 0.04 * np.clip(9 - surface.temperature, -10, 12)
    texture = plane_noise(stream(seed, "ground no2"), surface.window.east_m, surface.window.north_m, 15_000, 3)
    land = surface.cover != Cover.SEA_LAKE
    level = (2.2 + 1.2 * land + 7.5 * near**0.85 + 14 * traffic) * np.clip(still, 0.4, 2.0) * (1 + 0.12 * texture)
    return np.maximum(level * np.exp(-surface.elevation / 3000), 0.3).astype(np.float32)


def surface_o3(seed: int, surface: Surface, summer: list[float]) -> np.ndarray:
    """(H, W) float32: ozone at the ground summed over the year's days above a threshold, micrograms m-3 days.

    It follows the warmth of summer, from which place and column can be told; height; the weather of the summer months,
    which the columns of those months share; and it is eaten up where traffic and industry emit, which they do not show.

    Args:
        summer: days since 1970 of the months that count.
    """
    km = surface.window.gsd_m / 1000
    warmth = np.clip(surface.temperature + surface.season - 8, 0, 25)
    weather = np.mean([_weather(seed, "s5p_o3", surface.window, day) for day in summer], axis=0)
    near = gaussian_filter(surface.emission, 2.0 / km, mode="nearest")
    level = 1500 + 360 * warmth + 0.9 * surface.elevation + 1000 * weather
    return np.maximum(level * (1 - 0.4 * near / (near + 0.8)), 100).astype(np.float32)
