"""Values of cells to regress embeddings to: NetCDF or parquet on a 0.25-degree grid, brought onto the embeddings' cells.

Those are centred on multiples of 0.25 degrees (the ERA5 grid). Products whose cells have their corners there, half a cell
off, are brought over by the mean of the four cells around each node, of those that have a value: at a corner that is what
bilinear interpolation gives.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import GRID_COLUMNS, GRID_DEGREES, GRID_ROWS, grid_center

NEAR = 0.02
"""Of a cell: coordinates in single precision are this near to where they should be."""
LONGITUDES, LATITUDES = ("longitude", "lon", "x"), ("latitude", "lat", "y")
TIMES = ("time", "valid_time", "date", "month")


@dataclass(frozen=True)
class Targets:
    """``values``: (721, 1440, V) float32, NaN where a cell has none, oriented as the map of embeddings."""

    names: tuple[str, ...]
    values: np.ndarray
    half_cell: bool = False  # brought over from cells half a cell off


def open_targets(path: str | Path, variables: Sequence[str] | None = None) -> Targets:
    """Read a file's variables (all numeric ones by default).

    Of a NetCDF variable with a time axis, the mean and the standard deviation over it are targets, ``<name>_mean`` and
    ``<name>_std``; ``variables`` names the variable itself or one of the two.

    Raises:
        InputError: not such a file, no such variable, coordinates that are missing or on another grid.
    """
    try:
        if str(path).endswith(".parquet"):
            lon, lat, columns = _read_parquet(Path(path))
        else:
            lon, lat, columns = _read_netcdf(Path(path), variables)
        lon, lat = np.asarray(lon, np.float64), np.asarray(lat, np.float64)
    except FileNotFoundError:
        raise InputError(f"climate.targets: no such file: {path}") from None
    except (OSError, ValueError, TypeError, LookupError, struct.error, pa.ArrowException) as error:
        if isinstance(error, InputError):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"climate.targets: {path} cannot be read ({first[:200]}); give NetCDF or parquet") from None
    if variables is not None:
        chosen: dict[str, np.ndarray] = {}
        for name in variables:
            found = [k for k in columns if k in (name, f"{name}_mean", f"{name}_std")]
            if not found:
                raise InputError(f"climate.variables: {path} has no {name!r}; it has {', '.join(columns)}")
            chosen |= {k: columns[k] for k in found}
        columns = chosen
    if not columns:
        raise InputError(f"climate.targets: {path} has no numeric variable of cells")
    values_MV = np.stack([np.asarray(v, np.float32) for v in columns.values()], axis=-1)
    on_nodes, half = to_nodes(lon, lat, values_MV, str(path))
    return Targets(tuple(columns), on_nodes, half)


def to_nodes(lon: np.ndarray, lat: np.ndarray, values_MV: np.ndarray, source: str) -> tuple[np.ndarray, bool]:
    """Values of M places on the cells of the map; whether they were half a cell off.

    Raises:
        InputError: places on another grid, outside the globe, or given twice.
    """
    if not (np.isfinite(lon).all() and np.isfinite(lat).all()) or (np.abs(lat) > 90 + GRID_DEGREES / 2).any():
        raise InputError(f"climate.targets: {source} has places that are not on the globe; give degrees")
    if not len(lon):
        raise InputError(f"climate.targets: {source} has no rows")
    column, row = ((lon + 180) % 360) / GRID_DEGREES, (90 - lat) / GRID_DEGREES
    off_column, off_row = column - np.round(column), row - np.round(row)
    values = np.full((GRID_ROWS, GRID_COLUMNS, values_MV.shape[1]), np.nan, np.float32)
    if max(np.abs(off_column).max(), np.abs(off_row).max()) < NEAR:
        rows, columns = np.round(row).astype(int), np.round(column).astype(int) % GRID_COLUMNS
        _once(rows * GRID_COLUMNS + columns, source)
        values[rows, columns] = values_MV
        return values, False
    if min(np.abs(off_column).min(), np.abs(off_row).min()) < 0.5 - NEAR:
        raise InputError(
            f"climate.targets: {source} is not on a grid of 0.25 degrees (longitude {lon.flat[0]:g}, latitude {lat.flat[0]:g}, "
            "...): cells must be centred on multiples of 0.25 degrees, or half a cell beside them; regrid it first"
        )
    rows, columns = np.floor(row).astype(int), np.floor(column).astype(int)
    _once(rows * GRID_COLUMNS + columns, source)
    total = np.zeros(values.shape, np.float64)
    count = np.zeros(values.shape, np.int8)
    there = np.isfinite(values_MV)
    for south in (0, 1):
        for east in (0, 1):
            node = (np.clip(rows + south, 0, GRID_ROWS - 1), (columns + east) % GRID_COLUMNS)
            # Of a pass, no two cells have one node: plain indexing adds each.
            total[node] += np.where(there, values_MV, 0)
            count[node] += there
    np.divide(total, count, out=values, where=count > 0, casting="unsafe")
    return values, True


def _once(cells: np.ndarray, source: str) -> None:
    unique, counts = np.unique(cells, return_counts=True)
    if (counts > 1).any():
        row, column = divmod(int(unique[counts > 1][0]), GRID_COLUMNS)
        raise InputError(
            f"climate.targets: {source} has several values for the cell near longitude {column * GRID_DEGREES - 180:g}, "
            f"latitude {90 - row * GRID_DEGREES:g}; give one a cell"
        )


Columns = tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]


def _read_parquet(path: Path) -> Columns:
    table = pq.read_table(path)
    lon, lat = (next((n for n in table.column_names if n.lower() in names), None) for names in (LONGITUDES, LATITUDES))
    known = {lon, lat, "grid_id_coord", "grid_id", "row", "column"}
    columns = {
        name: table[name].to_numpy()
        for name in table.column_names
        if name not in known and (pa.types.is_floating(table[name].type) or pa.types.is_integer(table[name].type))
    }
    if lon is not None and lat is not None:
        return table[lon].to_numpy(), table[lat].to_numpy(), columns
    if "grid_id_coord" in table.column_names:
        try:
            places = [grid_center(int(str(name).split("_")[0])) for name in table["grid_id_coord"].to_pylist()]
        except ValueError as error:
            raise InputError(f"climate.targets: {path}: grid_id_coord: {error}") from None
        lon_lat = np.array(places).reshape(-1, 2)
        return lon_lat[:, 0], lon_lat[:, 1], columns
    raise InputError(
        f"climate.targets: {path} says no places: it needs the columns longitude and latitude, or grid_id_coord; it has "
        f"{', '.join(table.column_names)}"
    )


def _read_netcdf(path: Path, variables: Sequence[str] | None) -> Columns:
    import xarray

    with open(path, "rb") as file:
        engine = "h5netcdf" if file.read(4) == b"\x89HDF" else "scipy"
    with xarray.open_dataset(path, engine=engine, decode_times=False) as data:
        lon, lat = (
            next((str(n) for n in data.variables if str(n).lower() in names), None) for names in (LONGITUDES, LATITUDES)
        )
        if lon is None or lat is None or data[lon].ndim != 1 or data[lat].ndim != 1:
            raise InputError(
                f"climate.targets: {path} has no coordinates longitude and latitude of one dimension; it has "
                f"{', '.join(map(str, data.variables))}"
            )
        ends = data[lon].to_numpy()[[0, -1]]
        if len(data[lon]) > 1 and abs(abs(ends[1] - ends[0]) - 360) < 1e-3:  # the date line, or Greenwich, given twice
            data = data.isel({data[lon].dims[0]: slice(None, -1)})
        columns: dict[str, np.ndarray] = {}
        for name, values in sorted(data.data_vars.items(), key=lambda item: str(item[0])):
            if not {lon, lat} <= set(map(str, values.dims)) or values.dtype.kind not in "fiu":
                continue
            stem = str(name)
            if variables is not None and not {stem, f"{stem}_mean", f"{stem}_std"} & set(variables):
                continue
            found: dict[str, Any] = {stem: values.squeeze([d for d in values.dims if values.sizes[d] == 1 and d not in (lon, lat)])}  # fmt: skip
            others = [d for d in found[stem].dims if d not in (lon, lat)]
            if others and all(str(d).lower() in TIMES for d in others):
                found = {f"{stem}_mean": found[stem].mean(others), f"{stem}_std": found[stem].std(others)}
            elif others:
                raise InputError(
                    f"climate.targets: {path}: {stem} has the dimension {others[0]} beside place and time; choose one of its "
                    "values first, or leave it out by climate.variables"
                )
            columns |= {key: one.transpose(lat, lon).to_numpy().reshape(-1) for key, one in found.items()}
        if variables is not None and not columns:
            has = ", ".join(map(str, data.data_vars))
            raise InputError(f"climate.variables: {path} has none of {', '.join(variables)}; it has {has}")
        lats, lons = np.meshgrid(data[lat].to_numpy(), data[lon].to_numpy(), indexing="ij")
    return lons.reshape(-1), lats.reshape(-1), columns
