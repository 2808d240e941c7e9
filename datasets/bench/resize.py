"""Stored pixels -> the size that a model is fed: the right way, and the ways of the published code.

Shapes: C channels, H W pixels fed to the model, h w pixels stored, T taps of a kernel.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F

Interpolation = Literal["bilinear", "bicubic"]
CUBIC_A = np.float32(-0.75)  # OpenCV's free parameter of the cubic convolution kernel (Keys 1981)


def resize_image(x_Chw: torch.Tensor, size: int, mode: Interpolation) -> torch.Tensor:
    """(C, h, w) -> (C, size, size), pixels taken as areas, antialiased."""
    if x_Chw.shape[-2:] == (size, size):
        return x_Chw
    return F.interpolate(x_Chw[None], size=(size, size), mode=mode, align_corners=False, antialias=True)[0]


def resize_label(label_hw: np.ndarray, size: int) -> np.ndarray:
    """(h, w) -> (size, size), the pixel nearest to each new pixel's centre."""
    rows, columns = (
        np.minimum(((np.arange(size) + 0.5) * stored / size).astype(int), stored - 1) for stored in label_hw.shape
    )
    return label_hw[rows[:, None], columns[None, :]]


def published_bilinear(x_Chw: torch.Tensor, size: int) -> torch.Tensor:
    """(C, h, w) -> (C, size, size) as kornia's ``Resize(size, align_corners=True)`` resizes an image."""
    if x_Chw.shape[-2:] == (size, size):
        return x_Chw
    return F.interpolate(x_Chw[None], size=(size, size), mode="bilinear", align_corners=True)[0]


def published_mask(label_hw: np.ndarray, size: int) -> np.ndarray:
    """(h, w) -> (size, size) as kornia up to 0.8.0 resizes a mask: upper left corners, in float32 arithmetic."""
    label = torch.from_numpy(label_hw.astype(np.float32))  # class ids and codes are exact in float32
    return F.interpolate(label[None, None], size=(size, size), mode="nearest")[0, 0].numpy().astype(label_hw.dtype)


def published_nearest(label_hw: np.ndarray, size: int) -> np.ndarray:
    """(h, w) -> (size, size) as OpenCV's INTER_NEAREST: upper left corners, in float64 arithmetic."""
    rows, columns = (
        # The two divisions round as OpenCV's do: at some sizes another formula picks a neighbour.
        np.minimum(np.floor(np.arange(size) * (1.0 / (size / stored))).astype(int), stored - 1)
        for stored in label_hw.shape
    )
    return label_hw[rows[:, None], columns[None, :]]


def published_cubic(values_Chw: np.ndarray, size: int) -> np.ndarray:
    """(C, h, w) -> (C, size, size) as OpenCV's INTER_CUBIC: no antialiasing; integers are rounded and clipped to
    their type.

    The sums are those of OpenCV (modules/imgproc/src/resize.cpp) in float32 and in its order: integers that lie halfway
    between two are then rounded the same way. (Its builds with Intel's IPP sum in another order, not published: of labels
    magnified from 32 to 288 pixels, about one in 2,000 lies so close to halfway that it then falls to the other side.)
    """
    if values_Chw.shape[-2:] == (size, size):
        return values_Chw
    (rows_HT, weights_HT), (columns_WT, weights_WT) = (_cubic_taps(stored, size) for stored in values_Chw.shape[-2:])
    x_Chw = values_Chw.astype(np.float32)
    x_ChW = _weighted(np.moveaxis(x_Chw[..., columns_WT], -1, 0), weights_WT.T, from_the_last=False)
    x_CHW = _weighted(np.moveaxis(x_ChW[:, rows_HT], 2, 0), weights_HT.T[:, :, None], from_the_last=True)
    if np.issubdtype(values_Chw.dtype, np.floating):
        return x_CHW
    limits = np.iinfo(values_Chw.dtype)
    return np.rint(x_CHW).clip(limits.min, limits.max).astype(values_Chw.dtype)


def _weighted(taps: np.ndarray, weights: np.ndarray, from_the_last: bool) -> np.ndarray:
    order = (3, 2, 1, 0) if from_the_last else (0, 1, 2, 3)
    total = taps[order[0]] * weights[order[0]]
    for tap in order[1:]:
        total = taps[tap] * weights[tap] + total
    return total


def _cubic_taps(stored: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """For each new pixel the four stored ones, (size, 4), edges repeated, and their weights, float32 (size, 4)."""
    position = ((np.arange(size) + 0.5) * (1.0 / (size / stored)) - 0.5).astype(np.float32)
    first = np.floor(position)
    t = position - first
    a, one = CUBIC_A, np.float32(1)
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    u = one - t
    after = ((a + 2) * u - (a + 3)) * u * u + 1
    before = ((a * (t + 1) - 5 * a) * (t + 1) + 8 * a) * (t + 1) - 4 * a
    weights = np.stack([before, near, after, one - before - near - after], axis=1)
    taps = np.clip(first.astype(int)[:, None] + np.arange(-1, 3), 0, stored - 1)
    return taps, weights
