"""Shards without a fault, whose members tests then break one by one."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import make_grid
from test_slices import write_tar

from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import Grid, write_shards

TYPICAL = {"s5p_co": 0.03, "s5p_no2": 3e-5, "s5p_o3": 0.12, "s5p_so2": 1e-4}
"""mol m-2"""


def sound_grid(number: int, missing: tuple[str, ...] = ()) -> Grid:
    """A grid of the fixtures' form with values that its sensors can deliver."""
    grid = make_grid(number, missing)
    for name, array in grid.arrays.items():
        if name in TYPICAL:
            grid.arrays[name] = (TYPICAL[name] * (1 + 0.1 * (array - 1.5))).astype(np.float32)
        elif name == "s3_olci":
            scale = np.array(SENSORS[name].scale, np.float32)[:, None, None]
            grid.arrays[name] = (90 + 20 * np.tanh(array * scale - 1.5)) / scale
        elif name == "s2_toa":
            grid.arrays[name] = np.maximum(array, 1)
    return grid


def sound_shards(folder: Path, count: int, per_shard: int, missing: tuple[str, ...] = ()) -> list[Path]:
    return write_shards((sound_grid(i, missing) for i in range(count)), folder, per_shard)


def array_of(data: bytes) -> np.ndarray:
    return torch.load(io.BytesIO(data), weights_only=True).numpy()


def pth(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.from_numpy(np.ascontiguousarray(array)), buffer)
    return buffer.getvalue()


def change_array(contents: dict[str, bytes], member: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    contents[member] = pth(change(array_of(contents[member]).copy()))


def change_names(contents: dict[str, bytes], key: str, sensor: str, change: Callable[[Any], Any]) -> None:
    """``change`` gets the sensor's names as they are nested."""
    names = json.loads(contents[f"{key}.json"])
    names[sensor] = change(names[sensor])
    contents[f"{key}.json"] = json.dumps(names).encode()


def rename(names: Any, old: str, new: str) -> Any:
    """Nested names with a part of each replaced."""
    return [rename(n, old, new) for n in names] if isinstance(names, list) else names.replace(old, new)


__all__ = ["array_of", "change_array", "change_names", "pth", "rename", "sound_grid", "sound_shards", "write_tar"]
