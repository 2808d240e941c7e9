"""A sensor's arrays of one grid as images to look at: colours that compare between dates, titles, places.

Shapes: C bands, H W pixels.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from copernicus.datasets.sensors import Sensor
from copernicus.datasets.shards import LEADING_AXES
from copernicus.datasets.survey import SensorAt
from copernicus.platform.pictures import TRUE_COLOUR

GASES = ("s5p_co", "s5p_no2", "s5p_o3", "s5p_so2")
NO_VALUE = 0.82
"""The grey of pixels without a value."""


@dataclass
class Block:
    """A sensor's images in rows and columns.

    ``images``: (H, W, 3) in 0..1, or (H, W) of which ``range`` is drawn; None of one without values; empty where there are
    none, for the reason ``note``. ``titles``: the date of each, and whether it is the date of one before. ``places``: of
    each row, where rows are patches. ``about``: what one sees.
    """

    sensor: str
    columns: int
    rows: int
    about: str = ""
    images: list[np.ndarray | None] = field(default_factory=list)
    titles: list[tuple[str, bool]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    note: str = "missing"
    units: str = ""
    range: tuple[float, float] = (0.0, 1.0)


def to_block(array: np.ndarray, sensor: Sensor, at: SensorAt) -> Block:
    """A sensor's stored array, as `survey` describes it, as images: local patches in rows, dates in columns."""
    height, width = array.shape[-2:]
    leading = array.shape[: len(LEADING_AXES[sensor.name])]
    images = array.reshape(-1, sensor.channels, height, width)
    rows, columns = leading if len(leading) == 2 else (1, leading[0] if leading else 1)
    block = Block(sensor.name, columns, rows)
    size = f"{width} x {height} px of {sensor.gsd_m:g} m"
    if sensor.name == "dem":
        block.images = [_or_none(images[0, 0])]
        block.range = low, high = _percentiles(block.images, 0, 100)
        sea = "; blue is 0 m" if (images == 0).any() else ""
        block.about = f"elevation {low:.0f} to {high:.0f} m{sea}\nhill shade; {size}"
    elif sensor.name in GASES:
        columns_mol = [_or_none(x_CHW[0]) for x_CHW in images]
        factor, block.units = (1e6, "µmol m⁻²") if _percentiles(columns_mol, 2, 98)[1] < 2e-3 else (1e3, "mmol m⁻²")
        block.images = [None if x_HW is None else x_HW * factor for x_HW in columns_mol]
        block.range = _percentiles(block.images, 2, 98)
    else:
        block.images = _colour(images, sensor)
        bands = "VV, VH, VV - VH" if sensor.name == "s1_grd" else ", ".join(TRUE_COLOUR[sensor.name])
        kind = "false colour" if sensor.name == "s1_grd" else "true colour"
        block.about = f"{kind} {bands}\n{size}"
    for row in range(rows):
        seen: set[int | None] = set()
        for day in at.days[row * columns : (row + 1) * columns]:
            block.titles.append((_date(day), day in seen))
            seen.add(day)
    for number, (lon, lat) in enumerate(zip(at.lon, at.lat, strict=True)):
        where = "place unknown" if lon is None or lat is None else f"{lon:.4f}, {lat:.4f}"
        block.places.append(f"patch {number}\n{where}")
    return block


def _date(day: int | None) -> str:
    return "date unknown" if day is None else str(datetime.date(1970, 1, 1) + datetime.timedelta(days=day))


def _or_none(x_HW: np.ndarray) -> np.ndarray | None:
    return np.where(np.isfinite(x_HW), x_HW, np.nan) if np.isfinite(x_HW).any() else None


def _percentiles(images: Sequence[np.ndarray | None], low: float, high: float) -> tuple[float, float]:
    there = [image[np.isfinite(image)] for image in images if image is not None]
    values = np.concatenate(there) if there else np.zeros(0)
    if not len(values):
        return 0.0, 1.0
    found = np.percentile(values, (low, high))
    return float(found[0]), max(float(found[1]), float(found[0]) + 1e-12)


def _colour(images: np.ndarray, sensor: Sensor) -> list[np.ndarray | None]:
    """(H, W, 3) in 0..1 of each image, the same stretch for all, so that dates compare. A channel's range is from the
    darkest image's 2nd percentile to the median of all images' 95th, which clouds over some of them do not move."""
    composites = []
    for x_CHW in images:
        x_CHW = x_CHW.astype(np.float32)
        if sensor.name == "s1_grd":
            x_3HW = np.stack([x_CHW[0], x_CHW[1], x_CHW[0] - x_CHW[1]])
        else:
            x_3HW = x_CHW[[sensor.bands.index(band) for band in TRUE_COLOUR[sensor.name]]]
        unknown_HW = ~np.isfinite(x_3HW).all(axis=0)
        if sensor.name == "s2_toa":
            unknown_HW |= (x_CHW == 0).all(axis=0)  # no data
        composites.append(np.where(unknown_HW, np.nan, x_3HW))
    known = [x for x in composites if np.isfinite(x).any()]
    if not known:
        return [None] * len(composites)
    ends = np.array([np.nanpercentile(x, (2, 95), axis=(1, 2)) for x in known])  # (images, 2, 3)
    low_3, high_3 = ends[:, 0].min(axis=0), np.median(ends[:, 1], axis=0)
    spread_3 = np.maximum(high_3 - low_3, 1e-6)
    gamma = 1.0 if sensor.name == "s1_grd" else 0.7  # decibels are brightness already
    drawn: list[np.ndarray | None] = []
    for x_3HW in composites:
        scaled = np.clip((np.moveaxis(x_3HW, 0, -1) - low_3) / spread_3, 0, 1) ** gamma
        drawn.append(np.where(np.isnan(scaled), NO_VALUE, scaled) if np.isfinite(x_3HW).any() else None)
    return drawn
