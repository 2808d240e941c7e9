"""Pretraining augmentation: random resized crop and horizontal flip, with metadata that follows the crop."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

METRES_PER_DEGREE = 111_320.0  # of latitude; mean over the WGS-84 ellipsoid


@dataclass(frozen=True)
class Crop:
    """A rectangle of the stored image, pixels, and whether it is mirrored left to right."""

    top: int
    left: int
    height: int
    width: int
    flip: bool = False


def random_crop(
    rng: np.random.Generator, height: int, width: int, area: tuple[float, float] = (0.2, 1.0), flip: float = 0.5
) -> Crop:
    """A random resized crop as published: area fraction 0.2-1, aspect ratio 3/4-4/3, mirrored half of the time."""
    log_ratio = (math.log(3 / 4), math.log(4 / 3))
    flipped = bool(rng.random() < flip)
    for _ in range(10):
        target = rng.uniform(*area) * height * width
        ratio = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
        if 0 < w <= width and 0 < h <= height:
            return Crop(int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w, flipped)
    return Crop(0, 0, height, width, flipped)


def centre_crop(height: int, width: int) -> Crop:
    """The largest centred square: what validation sees."""
    side = min(height, width)
    return Crop((height - side) // 2, (width - side) // 2, side, side)


@functools.lru_cache(maxsize=2048)  # sides x sizes of a run: about 20 kB each at 960 pixels
def _taps(side: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Antialiased bilinear resampling of one axis: which input pixels (size, T) make an output pixel, and their weights.

    A triangle of half-width max(1, side / size) input pixels around the output pixel's centre, cut at the border and
    scaled to sum 1. Surplus taps repeat a pixel that counts, so that a NaN spreads to those pixels alone that it has a
    share in.
    """
    step = side / size
    half = max(step, 1.0)
    centre = (np.arange(size) + 0.5) * step - 0.5
    pixel = np.floor(centre - half).astype(np.int64)[:, None] + 1 + np.arange(int(np.ceil(2 * half)))
    weight = np.clip(1 - np.abs(pixel - centre[:, None]) / half, 0, None)
    weight[(pixel < 0) | (pixel >= side) | (weight < 1e-6)] = 0  # a share below float32 would only spread NaN
    weight /= weight.sum(axis=1, keepdims=True)
    pixel = np.where(weight > 0, pixel, np.take_along_axis(pixel, weight.argmax(axis=1)[:, None], axis=1))
    return pixel, weight.astype(np.float32)


def _resample_rows(x_CHW: np.ndarray, size: int, flip: bool = False) -> np.ndarray:
    """(C, H, W) -> (C, size, W): a weighted gather of whole rows, which is what embedding_bag's kernel does best."""
    bands, side, width = x_CHW.shape
    pixel, weight = _taps(side, size)
    if flip:
        pixel, weight = pixel[::-1], weight[::-1]
    rows = (np.arange(bands)[:, None, None] * side + pixel).reshape(bands * size, -1)
    weights = np.tile(weight, (bands, 1))
    table = torch.from_numpy(x_CHW.reshape(bands * side, width))
    out = F.embedding_bag(torch.from_numpy(rows), table, per_sample_weights=torch.from_numpy(weights), mode="sum")
    return out.view(bands, size, width).numpy()


def apply_crop(x_CHW: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """Cut the crop out and resample it to (C, size, size) float32 (bilinear, antialiased); NaN pixels stay NaN.

    Any stored dtype and any view of the bytes read will do. The way through rows is 1.8 times as fast as torch's own
    antialiased kernel on the eight sensors (LOG.md), and nearer to the exact weights, which torch rounds.
    """
    x = x_CHW[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    if x.shape[1:] == (size, size):
        return (x[:, :, ::-1] if crop.flip else x).astype(np.float32)
    # Rows are contiguous and gathered at memory speed; columns are not. So columns are resampled as rows of the
    # transposed image: two transpositions cost less than a gather along the fastest axis.
    x_CWH = np.ascontiguousarray(x.transpose(0, 2, 1)).astype(np.float32, copy=False)
    x_CHs = np.ascontiguousarray(_resample_rows(x_CWH, size, crop.flip).transpose(0, 2, 1))
    return _resample_rows(x_CHs, size)


def crop_metadata(
    lon: float, lat: float, gsd_m: float, patch_kernel: int, crop: Crop, height: int, width: int, size: int
) -> tuple[float, float, float]:
    """Centre and token area after the crop: (lon, lat in degrees, km^2). ``lon``, ``lat``: centre of the whole image."""
    east_m = (crop.left + crop.width / 2 - width / 2) * gsd_m
    south_m = (crop.top + crop.height / 2 - height / 2) * gsd_m
    # Longitude degrees shrink towards the poles; 0.05 keeps the shift finite there.
    lon = lon + east_m / METRES_PER_DEGREE / max(math.cos(math.radians(lat)), 0.05) if not math.isnan(lat) else lon
    lat = min(max(lat - south_m / METRES_PER_DEGREE, -90.0), 90.0) if not math.isnan(lat) else lat
    lon = (lon + 180.0) % 360.0 - 180.0
    token_m2 = (patch_kernel * gsd_m) ** 2 * (crop.height * crop.width) / (size * size)
    return lon, lat, token_m2 / 1e6
