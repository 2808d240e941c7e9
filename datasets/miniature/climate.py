"""The miniature planet's climatology, for the climate probe: what its images are made from, as targets to regress to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from copernicus.datasets.miniature.places import ground_temperature
from copernicus.datasets.miniature.planet import Planet
from copernicus.datasets.shards import GRID_COLUMNS, GRID_DEGREES, GRID_ROWS

CLIMATE_FILE = "climate.parquet"
EVERY = 4
"""Cells in between, each way: the file has one a degree, and those of the pretraining grids."""


def write_climate(planet: Planet, grids: Sequence[int], path: Path) -> None:
    """Columns longitude, latitude (degrees), temperature_mean, temperature_std (degrees C; of the seasons), precipitation_mean,
    precipitation_std (mm a month). The same planet and grids give the same file."""
    rows, columns = np.meshgrid(np.arange(0, GRID_ROWS, EVERY), np.arange(0, GRID_COLUMNS, EVERY), indexing="ij")
    cells = np.union1d((rows * GRID_COLUMNS + columns).reshape(-1), np.asarray(grids, np.int64))
    lat = cells // GRID_COLUMNS * GRID_DEGREES - 90
    lon = cells % GRID_COLUMNS * GRID_DEGREES - 180
    wide = planet.wide(lon, lat)
    rain = 200 * wide.moisture**1.5
    monsoon = 0.2 + 0.6 * np.exp(-(((np.abs(lat) - 14) / 9) ** 2))  # share of the year's rain that comes in a season
    table = pa.table({
        "longitude": lon, "latitude": lat, "temperature_mean": ground_temperature(wide),
        "temperature_std": wide.season / np.sqrt(2), "precipitation_mean": rain, "precipitation_std": rain * monsoon,
    })  # fmt: skip
    part = path.with_name(f".{path.name}.part")
    pq.write_table(table, part, compression="zstd")
    part.replace(path)
