"""Reading an embedding product: the means of its grids, whoever made them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import GRID_COLUMNS, GRID_ROWS
from copernicus.platform.embed_worker import unpacked

GRIDS_FILE = "grids.parquet"


def grids_file(path: Path) -> Path:
    """The file of grid means in a folder of embeddings, in an experiment's, or the file itself.

    Raises:
        InputError: there is none.
    """
    for candidate in (path, path / GRIDS_FILE, path / "embed" / GRIDS_FILE):
        if candidate.is_file():
            return candidate
    raise InputError(f"{path} holds no {GRIDS_FILE}; give the folder that an embed stage has finished")


def grid_tables(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of grids (G,) and their embeddings (G, D), a row group after the other.

    Raises:
        InputError: not such a file: columns that are missing, wrong grid ids, embeddings of different widths.
    """
    width: int | None = None
    try:
        with pq.ParquetFile(path) as file:
            missing = {"grid_id_coord", "embedding"} - set(file.schema_arrow.names)
            if missing:
                raise InputError(
                    f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(file.schema_arrow.names)}"
                )
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=["grid_id_coord", "embedding"])
                grids = np.array([grid_of(name, path) for name in table["grid_id_coord"].to_pylist()], np.int64)
                lengths = {len(row) for row in table["embedding"]} if table.num_rows else set()
                if width is not None:
                    lengths.add(width)
                if len(lengths) > 1:
                    raise InputError(f"{path}: embeddings of different widths: {sorted(lengths)}")
                if table.num_rows:
                    width = lengths.pop()
                    yield grids, unpacked(table["embedding"])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as grid means: {str(error).splitlines()[0][:200]}") from None


def grid_of(name: object, path: Path) -> int:
    """The number of a grid from its name, ``0200599_-70.25_-55.25``.

    Raises:
        InputError: no such grid.
    """
    number = str(name).split("_")[0]
    if not number.isdigit() or int(number) >= GRID_ROWS * GRID_COLUMNS:
        raise InputError(
            f"{path}: grid_id_coord {name!r} is no grid; it begins with its number, 0 to {GRID_ROWS * GRID_COLUMNS - 1}"
        )
    return int(number)
