"""The benchmark's local climate zones: 320 m patches of Sentinel-1 and Sentinel-2 in HDF5.

The planet's towns are of one density and have no heights, so the towns of a zone are built here, on the planet's plots:
density is the share of plots with a house, and heights show as the light and shade of their sides. Zones without
buildings are the planet as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter, uniform_filter

from copernicus.datasets.miniature import optical, radar
from copernicus.datasets.miniature.noise import keyed_rng
from copernicus.datasets.miniature.places import find_place
from copernicus.datasets.miniature.planet import Cover, Planet, Surface, Window
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.datasets.shards import days_since_1970

_YEAR_START = int(days_since_1970("20170101"))
_BANDS = ("B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B11", "B12")


@dataclass(frozen=True)
class _Town:
    """Share of the plots that carry a house, metres of height, how much of the town's streets there is."""

    density: float
    height: float
    streets: bool = True
    huts: bool = False  # a house a pixel, in no order


@dataclass(frozen=True)
class _Zone:
    """A cover to look for, the shares of it in the window, and what is built there."""

    cover: Cover
    least: float
    most: float = 1.0
    town: _Town | None = None


ZONES = {
    "Compact high rise": _Zone(Cover.RESIDENTIAL, 0.7, town=_Town(0.75, 45)),
    "Compact mid rise": _Zone(Cover.RESIDENTIAL, 0.7, town=_Town(0.75, 18)),
    "Compact low rise": _Zone(Cover.RESIDENTIAL, 0.7, town=_Town(0.75, 5)),
    "Open high rise": _Zone(Cover.RESIDENTIAL, 0.7, town=_Town(0.35, 45)),
    "Open mid rise": _Zone(Cover.RESIDENTIAL, 0.7, town=_Town(0.35, 18)),
    "Open low rise": _Zone(Cover.RESIDENTIAL, 0.7, town=_Town(0.35, 5)),
    "Lightweight low rise": _Zone(Cover.RESIDENTIAL, 0.7, town=_Town(0.8, 2, streets=False, huts=True)),
    "Large low rise": _Zone(Cover.INDUSTRIAL, 0.7, town=_Town(0.95, 6)),
    "Sparsely built": _Zone(Cover.RESIDENTIAL, 0.7, town=_Town(0.08, 5, streets=False)),
    "Heavy industry": _Zone(Cover.INDUSTRIAL, 0.7, town=_Town(0.5, 30)),
    "Dense trees": _Zone(Cover.FOREST, 0.9),
    "Scattered trees": _Zone(Cover.FOREST, 0.2, 0.55),
    "Bush, scrub": _Zone(Cover.HERBACEOUS, 0.8),
    "Low plants": _Zone(Cover.PASTURE, 0.7),
    "Bare rock or paved": _Zone(Cover.BARE, 0.8),
    "Bare soil or sand": _Zone(Cover.BARE, 0.8),
    "Water": _Zone(Cover.SEA_LAKE, 0.7),
}
"""In the order of the labels."""


def _sandy(surface: Surface) -> bool:
    return float(np.mean(0.35 * surface.broad + (surface.temperature - 12) / 40)) > 0


def _bushy(surface: Surface) -> bool:
    return float(np.mean(surface.moisture)) < 0.5


_SUITS: dict[str, Callable[[Surface], bool]] = {
    "Bush, scrub": _bushy,
    "Bare rock or paved": lambda surface: not _sandy(surface),
    "Bare soil or sand": _sandy,
}
"""What a place must be besides, in the words of its zone."""


def _build(surface: Surface, town: _Town, rng: np.random.Generator) -> Surface:
    """The ground with the town's houses on it."""
    draw = rng.uniform(size=surface.plot.shape) if town.huts else surface.plot
    house = draw < town.density
    # Materials take plots below 0.45 for houses (and those below 0.25 for yards of works).
    if surface.cover[surface.cover.shape[0] // 2, surface.cover.shape[1] // 2] == Cover.INDUSTRIAL:
        plot = np.where(house, 0.25 + 0.75 * draw / town.density, 0.25 * (draw - town.density) / (1 - town.density))
    else:
        plot = np.where(house, 0.45 * draw / town.density, 0.45 + 0.55 * (draw - town.density) / (1 - town.density))
    street = surface.street if town.streets else np.zeros_like(surface.street)
    roofs = gaussian_filter(np.where(house & (street == 0), town.height, 0.0), 0.6)
    south, east = np.gradient(roofs, surface.window.gsd_m)
    built = np.isin(surface.cover, (Cover.RESIDENTIAL, Cover.INDUSTRIAL))
    return dataclasses.replace(
        surface,
        plot=np.where(built, plot, surface.plot),
        street=street,
        slope_east=surface.slope_east + built * east,
        slope_north=surface.slope_north - built * south,
    )


def _radar(seed: int, surface: Surface, days: int, scene: int) -> np.ndarray:
    """(H, W, 8) float32: VH and VV as complex numbers, their filtered intensities, their filtered covariance."""
    rng = keyed_rng(seed, "lcz radar", scene)
    vv, vh = np.sqrt(10 ** (radar.backscatter_db(seed, surface, days, scene) / 10) / 2)
    real, imaginary = rng.normal(size=(2, 2, *vv.shape))
    waves = {"vh": vh * (real[0] + 1j * imaginary[0]), "vv": vv * (real[1] + 1j * imaginary[1])}
    smooth = {name: uniform_filter(np.abs(wave) ** 2, 5, mode="nearest") for name, wave in waves.items()}
    product = waves["vv"] * np.conj(waves["vh"])
    covariance = [uniform_filter(part, 5, mode="nearest") for part in (product.real, product.imag)]
    channels = [waves["vh"].real, waves["vh"].imag, waves["vv"].real, waves["vv"].imag]
    return np.stack([*channels, smooth["vh"], smooth["vv"], *covariance], axis=-1).astype(np.float32)


def make_climate_zone(planet: Planet, size: int, number: int, root: Path) -> dict[str, np.ndarray]:
    """One patch: ``sen1`` (H, W, 8), ``sen2`` (H, W, 10) reflectance, ``label`` (17,) of 0 and 1. Zones take turns.

    Nothing is written below ``root``: a split is one file, whose writer is handed all patches.

    Raises:
        InputError: the planet has no place for a zone.
    """
    seed, scene = planet.seed, 10_000_000 + number
    rng = keyed_rng(seed, "local climate zone", number)
    name = list(ZONES)[number % len(ZONES)]
    zone = ZONES[name]
    suits = _SUITS.get(name)
    for _ in range(40):
        lon, lat = find_place(planet, rng, zone.cover, size, zone.least, zone.most)
        surface = planet.surface(Window(lon, lat, size, 10.0))
        if suits is None or suits(surface):
            break
    else:
        raise InputError(f"miniature: the planet of seed {seed} has no place for {name!r}; try another seed")
    if zone.town:
        surface = _build(surface, zone.town, rng)
    days = _YEAR_START + int((200 if lat >= 0 else 17) + rng.normal(0, 45)) % 365
    toa = optical.s2_toa(seed, surface, days, scene, gain=rng.uniform(0.85, 1.15))
    order = [SENSORS["s2_toa"].bands.index(band) for band in _BANDS]
    return {
        "sen1": _radar(seed, surface, days, scene),
        "sen2": np.moveaxis(toa[order].astype(np.float32) / 10000, 0, -1),
        "label": (np.arange(len(ZONES)) == number % len(ZONES)).astype(np.uint8),
    }
