"""Quick-look picture of an encoded image: the image as people see it, beside what the tokens make of it.

Legend: C bands, H W pixels, h w tokens of a window, D width, N tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LightSource, Normalize
from matplotlib.figure import Figure

from copernicus.datasets.geotiff import Image
from copernicus.datasets.sensors import Sensor

_MISSING_GREY = 0.75
_LONGEST_SIDE = 1024  # pixels drawn; larger images are thinned out


@dataclass(frozen=True)
class Window:
    """A rectangle of an image, pixels."""

    row: int
    col: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        return slice(self.row, self.row + self.height), slice(self.col, self.col + self.width)


def stretch(x_HW: np.ndarray) -> np.ndarray:
    """Linear stretch of the 2nd to 98th percentile of the valid values to 0..1; NaN stays NaN."""
    low, high = np.nanpercentile(x_HW, (2, 98))
    return np.clip((x_HW - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)


def principal_components(tokens_ND: np.ndarray, count: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (D,), leading eigenvectors of the covariance (D, count) and their shares of the variance (count,).

    A vector's largest element is positive, so that the same tokens give the same colours.
    """
    mean_D = tokens_ND.mean(axis=0, dtype=np.float64)
    centred_ND = tokens_ND - mean_D
    variance, vectors_DD = np.linalg.eigh(centred_ND.T @ centred_ND)
    order = np.argsort(variance)[::-1][:count]
    axes_DK = vectors_DD[:, order]
    axes_DK = axes_DK * np.sign(axes_DK[np.abs(axes_DK).argmax(axis=0), np.arange(axes_DK.shape[1])])
    total = max(float(variance.sum()), np.finfo(np.float64).tiny)
    return mean_D, axes_DK, np.clip(variance[order], 0, None) / total


def component_map(
    shape: tuple[int, int], windows: Sequence[Window], tokens: Sequence[np.ndarray], valid_HW: np.ndarray, step: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """The first three principal components of the tokens as RGB in 0..1, at every ``step``-th pixel of the image.

    Components are found over the tokens that see valid pixels, each is interpolated to its window's pixels
    (bilinear), windows that overlap fade into each other, and each component is stretched on its own.

    Args:
        shape: (H, W) of the image.
        tokens: a (D, h, w) array for each window.
        valid_HW: where the image has values.

    Returns:
        (H', W', 3) with NaN where no window or no value lies, and the components' shares of the variance (3,).
    """
    mean_D, axes_DK, shares = principal_components(_seen_tokens(windows, tokens, valid_HW))
    height, width = (-(-side // step) for side in shape)
    total_HWK = np.zeros((height, width, axes_DK.shape[1]))
    weight_HW = np.zeros((height, width))
    for window, tokens_Dhw in zip(windows, tokens, strict=True):
        scores_Khw = np.einsum("dhw,dk->khw", tokens_Dhw - mean_D[:, None, None], axes_DK)
        rows = slice(window.row // step, min(height, -(-(window.row + window.height) // step)))
        cols = slice(window.col // step, min(width, -(-(window.col + window.width) // step)))
        size = (rows.stop - rows.start, cols.stop - cols.start)
        smooth_KHW = F.interpolate(torch.from_numpy(scores_Khw)[None], size=size, mode="bilinear")[0].numpy()
        ramp_H, ramp_W = (1 + np.minimum(np.arange(side), np.arange(side)[::-1]) for side in size)
        fade_HW = ramp_H[:, None] * ramp_W[None, :]
        total_HWK[rows, cols] += smooth_KHW.transpose(1, 2, 0) * fade_HW[..., None]
        weight_HW[rows, cols] += fade_HW
    hidden_HW = (weight_HW == 0) | ~valid_HW[::step, ::step]
    rgb_HW3 = np.full((height, width, 3), 0.5)
    for k in range(axes_DK.shape[1]):
        component_HW = total_HWK[..., k] / np.maximum(weight_HW, 1)
        rgb_HW3[..., k] = stretch(np.where(hidden_HW, np.nan, component_HW))
    rgb_HW3[hidden_HW] = np.nan
    return rgb_HW3, shares


def _seen_tokens(windows: Sequence[Window], tokens: Sequence[np.ndarray], valid_HW: np.ndarray) -> np.ndarray:
    """The tokens (N, D) that see any valid pixel."""
    seen = []
    for window, tokens_Dhw in zip(windows, tokens, strict=True):
        valid_1HW = torch.from_numpy(valid_HW[window.slices].astype(np.float32))[None]
        share_hw = F.adaptive_avg_pool2d(valid_1HW, tokens_Dhw.shape[1:])[0].numpy()
        seen.append(tokens_Dhw[:, share_hw > 0].T)
    return np.concatenate(seen)


def place_text(image: Image) -> str:
    """Such as ``38.946 S, 177.742 E``; empty where the place is unknown."""
    if math.isnan(image.lon):
        return ""
    return f"{abs(image.lat):.3f} {'NS'[image.lat < 0]}, {abs(image.lon):.3f} {'EW'[image.lon < 0]}"


def _visible_bands(sensor: Sensor) -> list[int]:
    """The bands nearest to red, green and blue light (665, 560, 490 nm); none where the sensor has no such light."""
    nearest = [min(range(sensor.channels), key=lambda c: abs(sensor.wavelengths_nm[c] - nm)) for nm in (665, 560, 490)]
    light = all(abs(sensor.wavelengths_nm[c] - nm) <= 40 for c, nm in zip(nearest, (665, 560, 490), strict=True))
    return nearest if light and len(set(nearest)) == 3 else []


def _on_grey(rgb_HW3: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(rgb_HW3), _MISSING_GREY, rgb_HW3)


def _draw_image(axes: Any, figure: Figure, image: Image, step: int) -> str:
    """Draws the image in the way its sensor is looked at and returns what was drawn."""
    sensor, x_CHW = image.sensor, image.array_CHW[:, ::step, ::step]
    if sensor.spectral and (bands := _visible_bands(sensor)):
        axes.imshow(_on_grey(np.stack([stretch(x_CHW[c]) for c in bands], axis=-1)))
        return f"true colour ({', '.join(sensor.bands[c] for c in bands)})"
    if sensor.bands == ("VV", "VH"):
        vv, vh = x_CHW
        axes.imshow(_on_grey(np.stack([stretch(vv), stretch(vh), stretch(vv - vh)], axis=-1)))
        return "false colour (VV, VH, VV - VH)"
    low, high = np.nanpercentile(x_CHW[0], (2, 98))
    if sensor.units == "m":
        spacing = step * (image.gsd_m if math.isfinite(image.gsd_m) else sensor.gsd_m)
        elevation_HW = np.where(np.isnan(x_CHW[0]), np.nanmedian(x_CHW[0]), x_CHW[0])
        # Exaggerated so that a flat scene still shows its relief.
        slope = np.percentile(np.hypot(*np.gradient(elevation_HW, spacing)), 98) if min(elevation_HW.shape) > 1 else 0
        shaded = LightSource(azdeg=315, altdeg=45).shade(
            elevation_HW,
            colormaps["terrain"],
            vmin=low,
            vmax=max(high, low + 1),
            blend_mode="soft",
            vert_exag=min(max(1.0, 0.5 / slope), 30) if slope > 0 else 1,
            dx=spacing,
            dy=spacing,
        )[..., :3]
        shaded[np.isnan(x_CHW[0])] = np.nan
        axes.imshow(_on_grey(shaded))
        kind, colours = "hill shade", "terrain"
    else:
        kind, colours = sensor.bands[0], "gray" if sensor.spectral else "viridis"
        colormap = colormaps[colours].with_extremes(bad=(_MISSING_GREY,) * 3)
        axes.imshow(x_CHW[0], cmap=colormap, vmin=low, vmax=high)
    bar = figure.colorbar(
        ScalarMappable(Normalize(low, max(high, low + np.finfo(np.float32).tiny)), colormaps[colours]),
        ax=axes,
        orientation="horizontal",
        fraction=0.046,
        pad=0.03,
    )
    bar.set_label(f"{sensor.bands[0].replace('_', ' ')}, {sensor.units} (2nd to 98th percentile)", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return kind


def draw_quicklook(
    path: Path,
    image: Image,
    windows: Sequence[Window],
    tokens: Sequence[np.ndarray],
    image_share: float,
    encoder: str,
) -> None:
    """Writes a PNG: the image (true colour, false colour, hill shade or one variable's values) and its tokens.

    Args:
        tokens: of each window, (D, h, w), position and place taken off (see `encode_image`).
        image_share: how much is left of the tokens' variance.
        encoder: named in the title.
    """
    valid_HW = np.isfinite(image.array_CHW).any(axis=0)
    shape = (image.array_CHW.shape[1], image.array_CHW.shape[2])
    step = -(-max(shape) // _LONGEST_SIDE)
    rgb_HW3, shares = component_map(shape, windows, tokens, valid_HW, step)

    figure = Figure(figsize=(11, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.set_title(_draw_image(left, figure, image, step), fontsize=10)
    right.imshow(_on_grey(rgb_HW3))
    right.set_title("first three principal components of the tokens, less position and place", fontsize=10)
    for k, (share, colour) in enumerate(zip(shares, ("red", "green", "blue"), strict=False)):
        label = f"{colour}: PC{k + 1} ({share:.0%})"
        right.text(k / 3, -0.03, label, transform=right.transAxes, color=f"tab:{colour}", fontsize=8, va="top")
    left_over = f"variance over that of the tokens with position and place: {image_share:.2g}"
    right.text(0, -0.08, left_over, transform=right.transAxes, fontsize=8, va="top")
    for axes in (left, right):
        axes.set_xticks([])
        axes.set_yticks([])
    count = sum(t.shape[1] * t.shape[2] for t in tokens)
    date = "date unknown" if image.acquired is None else image.acquired.strftime("%Y-%m-%d")
    figure.suptitle(
        f"{image.path.name}\n{image.sensor.name}   {shape[1]} x {shape[0]} px   {place_text(image) or 'place unknown'}"
        f"   {date}\n{count} tokens in {len(windows)} window{'s' * (len(windows) > 1)}, {encoder}",
        fontsize=9,
    )
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=110)
    part.replace(path)
