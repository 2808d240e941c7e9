"""Reading an embedding product: the means of its grids, whoever made them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import GRID_COLUMNS, GRID_ROWS, grid_name
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
    raise InputError(
        f"{path} holds no {GRIDS_FILE}; give the folder that an embed stage has finished, or run that experiment again, which "
        "writes what is missing"
    )


def grid_tables(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Numbers of grids (G,) and their embeddings (G, D), a row group after the other.

    Raises:
        InputError: not such a file: columns that are missing or of another kind, wrong grid ids or one twice, embeddings of
            different widths or that are not finite.
    """
    width: int | None = None
    seen = np.zeros(GRID_ROWS * GRID_COLUMNS, bool)
    try:
        with pq.ParquetFile(path) as file:
            _check_columns(file.schema_arrow, path)
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=["grid_id_coord", "embedding"])
                if not table.num_rows:
                    continue
                grids = np.array([grid_of(name, path) for name in table["grid_id_coord"].to_pylist()], np.int64)
                if table["embedding"].null_count:
                    raise InputError(f"{path}: {table['embedding'].null_count} embeddings are null")
                lengths = set(pc.unique(pc.list_value_length(table["embedding"])).to_pylist())
                if width is not None:
                    lengths.add(width)
                if len(lengths) > 1:
                    raise InputError(f"{path}: embeddings of different widths: {sorted(lengths)}")
                width = lengths.pop()
                unique, counts = np.unique(grids, return_counts=True)
                if len(again := unique[(counts > 1) | seen[unique]]):
                    raise InputError(f"{path}: grid {grid_name(int(again[0]))} is there twice; give the means of grids")
                seen[unique] = True
                z_GD = unpacked(table["embedding"])
                if not (sound := np.isfinite(z_GD).all(1)).all():
                    raise InputError(f"{path}: the embedding of grid {grid_name(int(grids[~sound][0]))} is not finite")
                yield grids, z_GD
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read as grid means: {str(error).splitlines()[0][:200]}") from None


def _check_columns(schema: pa.Schema, path: Path) -> None:
    if missing := {"grid_id_coord", "embedding"} - set(schema.names):
        raise InputError(f"{path} has no column {', '.join(sorted(missing))}; it has {', '.join(schema.names)}")
    kind = schema.field("embedding").type
    lists = pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind) or pa.types.is_large_list(kind)
    if not lists or not pa.types.is_floating(kind.value_type):
        raise InputError(f"{path}: embedding holds {kind}; it must be lists of floating-point numbers")


def grid_of(name: object, path: Path) -> int:
    """The number of a grid from its name, ``0200599_-70.25_-55.25``.

    Raises:
        InputError: no such grid.
    """
    number = str(name).split("_")[0]
    if not (number.isascii() and number.isdigit()) or int(number) >= GRID_ROWS * GRID_COLUMNS:
        raise InputError(
            f"{path}: grid_id_coord {name!r} is no grid; it begins with its number, 0 to {GRID_ROWS * GRID_COLUMNS - 1}"
        )
    return int(number)
