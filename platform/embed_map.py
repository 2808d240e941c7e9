"""Grid means -> the map of the globe: 721 x 1440 cells of D numbers, in three formats, and which grid each cell is.

Orientation: row 0 is 90 degrees north, row 720 is 90 degrees south; column 0 is 180 degrees west, column 1439 is 179.75
degrees east; steps of 0.25 degrees, a cell is centred on its coordinates. (Grid numbers count from the south: the map's row
is 720 less the grid's.) Cells without an embedding are 0, ``count`` says how many images each is the mean of and ``mask``
which have any. The published file does not say which corner comes first; ours carries its coordinates.

The map is put together in a file that is mapped into memory, so it may be larger than that.
"""

from __future__ import annotations

import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import GRID_COLUMNS, GRID_DEGREES, GRID_ROWS, grid_name
from copernicus.platform.embed_worker import unpacked

NPZ, PT, ZARR, PIXELS = "map.npz", "map.pt", "map.zarr", "grid_0_25_globe_pix.parquet"
BAND = 16
"""Rows that are written at once, and of a chunk of the Zarr array."""
LATITUDE = 90 - GRID_DEGREES * np.arange(GRID_ROWS)
"""Degrees north of each row."""
LONGITUDE = GRID_DEGREES * np.arange(GRID_COLUMNS) - 180
"""Degrees east of each column."""

Progress = Callable[[int, int, str], None]


def pixels_of(grids_G: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Grid numbers -> rows and columns of the map."""
    return GRID_ROWS - 1 - grids_G // GRID_COLUMNS, grids_G % GRID_COLUMNS


@dataclass(frozen=True)
class GlobeMap:
    """``values``: (721, 1440, D) float32, mapped from a file. ``count``: images of each cell, (721, 1440); ``by_sensor``: of
    each sensor, (S, 721, 1440)."""

    values: np.ndarray
    count: np.ndarray
    by_sensor: np.ndarray

    @property
    def mask(self) -> np.ndarray:
        return self.count > 0


def fill_map(tables: Iterable[pa.Table], width: int, scratch: Path) -> GlobeMap:
    """Put grid means (of `grid_schema`) in their places. ``scratch``: the file that holds the numbers meanwhile."""
    values = np.lib.format.open_memmap(
        scratch, mode="w+", dtype=np.float32, shape=(GRID_ROWS, GRID_COLUMNS, width)
    )  # sparse: cells that nobody writes take no room
    count = np.zeros((GRID_ROWS, GRID_COLUMNS), np.int32)
    by_sensor = np.zeros((len(SENSORS), GRID_ROWS, GRID_COLUMNS), np.int32)
    for table in tables:
        grids = np.array([int(name.split("_")[0]) for name in table["grid_id_coord"].to_pylist()], np.int64)
        rows, columns = pixels_of(grids)
        values[rows, columns] = unpacked(table["embedding"])
        count[rows, columns] = table["images"].to_numpy()
        for number, name in enumerate(SENSORS):
            by_sensor[number, rows, columns] = table[f"images_{name}"].to_numpy()
    return GlobeMap(values, count, by_sensor)


def write_map(globe: GlobeMap, folder: Path, formats: Iterable[str], update: Progress) -> list[Path]:
    """Write the map in these of ``MAP_FORMATS`` and the parquet file that says which cell is which grid."""
    writers = {"npz": (write_npz, NPZ), "pt": (write_pt, PT), "zarr": (write_zarr, ZARR)}
    chosen = [writers[name] for name in formats]
    written = []
    for number, (write, name) in enumerate([*chosen, (write_pixels, PIXELS)]):
        update(number, len(chosen) + 1, name)
        path = folder / name
        part = folder / f".{name}.part"
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
        write(globe, part)
        if path.is_dir():
            shutil.rmtree(path)
        part.replace(path)
        written.append(path)
    update(len(chosen) + 1, len(chosen) + 1, "")
    return written


def write_npz(globe: GlobeMap, path: Path) -> None:
    """``arr_0``: the map, as published; ``count``, ``mask``, ``latitude``, ``longitude`` beside it."""
    small = {"count": globe.count, "mask": globe.mask, "latitude": LATITUDE, "longitude": LONGITUDE}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in {"arr_0": globe.values, **small}.items():
            member = zipfile.ZipInfo(f"{name}.npy")  # of 1980: the same map is the same bytes
            member.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(member, "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": array.dtype.str, "fortran_order": False, "shape": array.shape}
                )
                for start in range(0, len(array), BAND):
                    file.write(np.ascontiguousarray(array[start : start + BAND]).data.cast("B"))


def write_pt(globe: GlobeMap, path: Path) -> None:
    """The tensor alone, as published."""
    torch.save(torch.from_numpy(globe.values), path)


def write_zarr(globe: GlobeMap, path: Path) -> None:
    """``embedding`` (latitude, longitude, feature) in chunks, ``count`` and ``mask``, with their coordinates as xarray and
    NetCDF have them (CF conventions)."""
    import zarr

    rows, columns, width = globe.values.shape
    # Format 3: in the older one the fill value of empty cells would mean "missing", and every 0 be read as NaN.
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs.update(
        {"Conventions": "CF-1.10", "title": "Embeddings of the globe at 0.25 degrees: means over images"}
    )

    def add(name: str, dims: tuple[str, ...], dtype: str, chunks: tuple[int, ...], **attributes: Any) -> Any:
        shape = tuple({"latitude": rows, "longitude": columns, "feature": width}[dim] for dim in dims)
        return group.create_array(
            name, shape=shape, chunks=chunks, dtype=dtype, fill_value=0, dimension_names=dims, attributes=attributes
        )

    plane = ("latitude", "longitude")
    for name, values, units in (("latitude", LATITUDE, "degrees_north"), ("longitude", LONGITUDE, "degrees_east")):
        add(name, (name,), "float64", values.shape, units=units, standard_name=name)[:] = values
    add("count", plane, "int32", (rows, columns), long_name="images that a cell is the mean of")[:] = globe.count
    add("mask", plane, "bool", (rows, columns), long_name="cells that have an embedding")[:] = globe.mask
    embedding = add("embedding", (*plane, "feature"), "float32", (BAND, 144, width), long_name="mean embedding")
    for start in range(0, rows, BAND):
        if globe.mask[start : start + BAND].any():  # what is not written reads as 0
            embedding[start : start + BAND] = globe.values[start : start + BAND]
    with warnings.catch_warnings():  # that the specification does not have it yet; xarray warns where it is not there
        warnings.simplefilter("ignore")
        zarr.consolidate_metadata(path)


def write_pixels(globe: GlobeMap, path: Path) -> None:
    """A row a cell, from the north: its grid's name, its place (degrees), its row and column and its number of images."""
    rows, columns = (axis.reshape(-1).astype(np.int32) for axis in np.indices(globe.count.shape))
    grids = (GRID_ROWS - 1 - rows) * GRID_COLUMNS + columns
    table = pa.table({
        "grid_id_coord": [grid_name(int(grid)) for grid in grids], "longitude": LONGITUDE[columns],
        "latitude": LATITUDE[rows], "row": rows, "column": columns, "images": globe.count.reshape(-1),
    })  # fmt: skip
    pq.write_table(table, path, compression="zstd")
