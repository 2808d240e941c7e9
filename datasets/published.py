"""What the public pretraining code does to its images and their metadata, quirks included: `pretrain.preset: published`.

Beside each function stands the right way, which the default preset takes: `Sensor.normalize` with the sensor's own
numbers, `augment.apply_crop`, `augment.crop_metadata`.
Source: github.com/zhu-xlab/Copernicus-FM, folder Copernicus-FM/src (``main_pretrain.py``, ``engine_pretrain.py``), and
kornia 0.9 (``RandomResizedCrop``), by which it crops. Shapes: C channels, H W pixels.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F

from copernicus.datasets.augment import Crop
from copernicus.datasets.sensors import Sensor

DEGREES_PER_METRE = 0.00009
"""As published, for longitude at every latitude (``GSD_DEG``)."""

FADED_BANDS = {"s3_olci": (0, 9)}
FADING = 1e-9

LAST_S5P = "s5p_so2"
"""The four gases share one transform object there, whose parameters are read after the last of them ran."""


def published_sensor(sensor: Sensor) -> Sensor:
    """The sensor as pretraining normalises it there: Sentinel-3's bands 0 and 9 (Oa01, Oa10) times 1e-9, so nearly 0.

    Only pretraining does so; the benchmark feeds these two bands at full scale (``sample_one_time_stamp``).
    """
    faded = FADED_BANDS.get(sensor.name)
    if faded is None:
        return sensor
    scale = tuple(value * FADING if band in faded else value for band, value in enumerate(sensor.scale))
    return dataclasses.replace(sensor, scale=scale)


def published_apply_crop(x_CHW: np.ndarray, crop: Crop, size: int) -> np.ndarray:
    """Cut the crop out and resample it to (C, size, size) float32 as kornia does by default: bilinear, the corners' pixel
    centres kept in place, no antialiasing, then mirrored. A NaN spoils each value that has it as a neighbour."""
    cut = x_CHW[:, crop.top : crop.top + crop.height, crop.left : crop.left + crop.width]
    x_1CHW = torch.from_numpy(np.ascontiguousarray(cut).astype(np.float32, copy=True))[None]
    x = F.interpolate(x_1CHW, size=(size, size), mode="bilinear", align_corners=True)[0].numpy()
    return np.ascontiguousarray(x[:, :, ::-1]) if crop.flip else x


def published_crop_metadata(
    lon: float, lat: float, gsd_m: float, patch_kernel: int, crop: Crop, height: int, width: int
) -> tuple[float, float, float]:
    """Centre and token area after the crop with ``scale_option=augarea``: (lon, lat in degrees, km^2).

    The crop's corners are pixels that belong to it, so that its sides come out one pixel short and its centre half a
    pixel up and left: no crop of 264 pixels gives 0.9924 of the area. Degrees of longitude do not shrink with latitude.
    The area is a share of the stored image's, without the change of pixel size that resampling to the training size
    brings (264 to 224 pixels: 1.39 in area). Where the shift leaves the globe it ends at the edge; the public code goes
    on beyond it.
    """
    east = crop.left + (crop.width - 1) / 2 - width / 2
    south = crop.top + (crop.height - 1) / 2 - height / 2
    lon = max(lon + east * gsd_m * DEGREES_PER_METRE, -180.0)
    lat = min(max(lat - south * gsd_m * DEGREES_PER_METRE, -90.0), 90.0)
    share = (crop.width - 1) * (crop.height - 1) / (height * width)
    return lon, lat, (patch_kernel * gsd_m / 1000) ** 2 * share
