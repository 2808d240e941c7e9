"""Pretraining augmentation: random resized crop and horizontal flip, with metadata that follows the crop."""

from __future__ import annotations

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


def apply_crop(x_CHW: torch.Tensor, crop: Crop, size: int) -> torch.Tensor:
    """Cut the crop out and resample it to (C, size, size) (bilinear, antialiased); NaN pixels stay NaN."""
    x = x_CHW[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width].float()
    if x.shape[-2:] != (size, size):
        x = F.interpolate(x[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return x.flip(-1) if crop.flip else x.contiguous()


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
