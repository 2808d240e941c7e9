"""The benchmark's flood task: water that stands where the land is lowest, on the last of three dates."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from copernicus.datasets.miniature import optical, radar
from copernicus.datasets.miniature.noise import keyed_rng
from copernicus.datasets.miniature.places import find_place
from copernicus.datasets.miniature.planet import Cover, Planet, Window
from copernicus.datasets.miniature.raster import write_tif
from copernicus.datasets.shards import date_string, days_since_1970

_YEAR_START = int(days_since_1970("20210101"))


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
        write_tif(folder / f"{name}.tif", array[None], 3857, lon, lat, (10.0 / np.cos(np.radians(lat)),) * 2)
        datasets[kind] = {"name": name, "source_date": date_string(day)}

    for when, day in days.items():
        image = 10 ** (radar.s1_grd(seed, surface, day, scene, flood if when == "MS1" else None) / 10)
        image[:, ~valid] = 0.0
        write(f"{when}_IVV", image[0], day)
        write(f"{when}_IVH", image[1], day)
    write("MK0_MLU", label, last)
    write("MK0_MNA", valid.astype(np.uint8), last)
    return digest, {"path": f"{activation}/{area}/{digest}", "info": {"datasets": datasets}}
