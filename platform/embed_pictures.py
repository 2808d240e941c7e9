"""Pictures of the map of the globe: its principal components as colours, and where each sensor has images.

Where few cells have an embedding, each is drawn larger than it is, so that there is something to see; the caption says how
large.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt

from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import GRID_DEGREES
from copernicus.platform.embed_map import GlobeMap

NOTHING = (0.93, 0.93, 0.94)
"""Colour of cells without an embedding: mostly ocean."""
EXTENT = (-180 - GRID_DEGREES / 2, 180 - GRID_DEGREES / 2, -90 - GRID_DEGREES / 2, 90 + GRID_DEGREES / 2)
ABOUT_ALL_LAND = 340_000
"""Cells of 0.25 degrees that are land."""


def principal_components(globe: GlobeMap, count: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """(cells x count) scores of the cells that have an embedding, row by row, and the share of the variance of each
    component. A component points where its largest weight is positive.

    The map is read twice, a row at a time: moments, then scores.
    """
    rows = np.flatnonzero(globe.mask.any(1))
    width = globe.values.shape[2]
    number, total_D, products_DD = 0, np.zeros(width), np.zeros((width, width))
    for row in rows:
        x_ND = globe.values[row, globe.mask[row]].astype(np.float64)
        number += len(x_ND)
        total_D += x_ND.sum(0)
        products_DD += x_ND.T @ x_ND
    mean_D = total_D / number
    variances, axes_DD = np.linalg.eigh(products_DD / number - np.outer(mean_D, mean_D))
    axes_DK = axes_DD[:, ::-1][:, :count]
    axes_DK = axes_DK * np.sign(np.take_along_axis(axes_DK, np.abs(axes_DK).argmax(0)[None], 0))
    scores = [(globe.values[row, globe.mask[row]].astype(np.float64) - mean_D) @ axes_DK for row in rows]
    share = np.clip(variances[::-1][:count], 0, None) / max(variances.sum(), 1e-30)
    return np.concatenate(scores), share


def spread(mask: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], float]:
    """Where to draw: cells no farther from one that is filled than about half the usual distance between those; the filled
    cell nearest to each; and that distance, degrees."""
    reach = 0.6 * math.sqrt(ABOUT_ALL_LAND / max(1, int(mask.sum())))
    if reach < 1:
        return mask, tuple(np.indices(mask.shape)), GRID_DEGREES / 2  # type: ignore[return-value]
    columns = mask.shape[1]
    around = np.pad(mask, ((0, 0), (columns // 4, columns // 4)), mode="wrap")  # the globe goes on at the date line
    distance, (row, column) = distance_transform_edt(~around, return_indices=True)
    own = slice(columns // 4, columns // 4 + columns)
    return distance[:, own] <= reach, (row[:, own], (column[:, own] - columns // 4) % columns), reach * GRID_DEGREES


def draw_components(globe: GlobeMap, title: str, path: Path) -> Path:
    """The first three principal components as red, green and blue, each stretched from its 2nd to its 98th percentile."""
    scores, share = principal_components(globe)
    scores = np.pad(scores, ((0, 0), (0, max(0, 3 - scores.shape[1]))))
    low, high = np.percentile(scores, (2, 98), axis=0)
    colours = np.zeros((*globe.mask.shape, 3), np.float32)
    colours[globe.mask] = np.clip((scores - low) / np.maximum(high - low, 1e-12), 0, 1)
    shown, (rows, columns), reach = spread(globe.mask)
    picture = np.full_like(colours, NOTHING)
    picture[shown] = colours[rows[shown], columns[shown]]
    figure, (axis,) = new_figure(1, 12.0)
    axis.imshow(picture, extent=EXTENT, interpolation="nearest")
    on_globe(axis, title)
    parts = ", ".join(f"{name} {part:.0%}" for name, part in zip(("red", "green", "blue"), share, strict=False))
    axis.set_xlabel("longitude")
    axis.set_ylabel("latitude")
    figure.supxlabel(
        f"{int(globe.mask.sum()):,} cells; principal components: {parts} of the variance; no image where grey{_said(reach)}",
        fontsize="medium",
    )
    return save(figure, path)


def draw_coverage(globe: GlobeMap, title: str, path: Path, sensors: Sequence[str] = tuple(SENSORS)) -> Path:
    """How many images each cell has of each sensor, a panel each."""
    from matplotlib.ticker import MaxNLocator

    names = list(SENSORS)
    most = max(1, int(globe.by_sensor.max()))
    figure, axes = new_figure(len(sensors), 14.0, columns=2)
    for axis, name in zip(axes, sensors, strict=False):
        count = globe.by_sensor[names.index(name)]
        there = count > 0
        on_globe(axis, f"{name}: {int(count.sum()):,} images in {int(there.sum()):,} cells")
        shown, (rows, columns), reach = spread(there)
        values = np.ma.masked_where(~shown, count[rows, columns])
        drawn = axis.imshow(values, extent=EXTENT, interpolation="nearest", cmap="viridis", vmin=0, vmax=most)
    figure.suptitle(f"{title}{_said(reach)}")
    figure.colorbar(drawn, ax=axes, shrink=0.5, aspect=40, label="images of a cell", ticks=MaxNLocator(integer=True))
    for axis in axes[len(sensors) :]:
        axis.set_visible(False)
    return save(figure, path)


def _said(reach: float) -> str:
    return "" if reach <= GRID_DEGREES / 2 else f"; cells drawn {reach:.1f}° around"


def new_figure(panels: int, width: float, columns: int = 1, aspect: float = 0.5) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-panels // columns)
    figure = Figure(figsize=(width, 0.8 + rows * (aspect * width / columns)), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(rows, columns, squeeze=False)
    return figure, list(axes.flat)


def on_globe(axis: Any, title: str) -> None:
    axis.set_title(title)
    axis.set_facecolor(NOTHING)
    axis.set_xlim(-180, 180)
    axis.set_ylim(-90, 90)
    axis.set_xticks(range(-180, 181, 60), [_degrees(d, "WE") for d in range(-180, 181, 60)])
    axis.set_yticks(range(-90, 91, 30), [_degrees(d, "SN") for d in range(-90, 91, 30)])
    axis.grid(color="white", linewidth=0.4, alpha=0.7)
    axis.set_aspect("equal")


def _degrees(value: int, sides: str) -> str:
    return f"{abs(value)}°{sides[value > 0] if value else ''}"


def save(figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
