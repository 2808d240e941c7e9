"""An image in the form in which a shard stores it: its side, its type, and the number of dates of one place.

Source: the data set's published converter. An image's shorter side is resampled to the stored size, its centre is cut
out, Sentinel-2 is cast to int16, and places with fewer dates than the published number repeat random ones of theirs.
Legend of shapes: C bands, H rows, W columns.
"""

from __future__ import annotations

import numpy as np
import torch

from copernicus.datasets.geotiff import resample
from copernicus.datasets.order import generator
from copernicus.datasets.shards import STORED_DTYPE


def published_dates(sensor: str) -> int:
    """Dates stored for each place: 4 of s1 and s2, 8 of s3, 12 of s5p, 1 of dem."""
    return (
        1 if sensor == "dem" else 12 if sensor.startswith("s5p") else {"s1_grd": 4, "s2_toa": 4, "s3_olci": 8}[sensor]
    )


def fill_dates(count: int, sensor: str, seed: int, key: str, patch: str) -> list[int]:
    """Which of a place's ``count`` dates stand at the stored ones: each once, in order, then random ones again.

    Args:
        key, patch: the grid's key and the patch's name ("" where the sensor has no patches); with the seed and the
            sensor's name they key the randomness. Dates beyond the published number have no place.
    """
    wanted = published_dates(sensor)
    again = generator("fill dates", seed, key, sensor, patch).integers(count, size=max(wanted - count, 0))
    return [*range(min(count, wanted)), *map(int, again)]


def as_stored(x_CHW: np.ndarray, sensor: str, size: int) -> np.ndarray:
    """float32 (C, H, W) -> (C, size, size) of the sensor's stored type; resampled only where the shorter side is not
    ``size``. In an integer type NaN becomes 0, and what it cannot hold its nearest limit."""
    height, width = x_CHW.shape[1:]
    ratio = size / min(height, width)
    shape = (max(size, round(height * ratio)), max(size, round(width * ratio)))
    if shape != (height, width):
        x_CHW = resample(torch.from_numpy(x_CHW[None].copy()), shape)[0].numpy()
    top, left = (x_CHW.shape[1] - size) // 2, (x_CHW.shape[2] - size) // 2
    return to_type(x_CHW[:, top : top + size, left : left + size], STORED_DTYPE[sensor])


def to_type(x_CHW: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The values in a stored type (see `as_stored`)."""
    if dtype.kind == "i":
        limits = np.iinfo(dtype)
        x_CHW = np.clip(np.rint(np.nan_to_num(x_CHW, nan=0.0)), limits.min, limits.max)
    return x_CHW.astype(dtype)
