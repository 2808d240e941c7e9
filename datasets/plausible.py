"""What values a sensor can deliver, when it has flown, and how an array compares with that.

Two ranges a sensor, in its units (after its ``scale``). Values outside ``low..high`` are rare: a few are outliers, many
are another unit or another sensor. Values outside ``floor..ceiling`` are no measurement at all but a fill value (-9999,
9.97e36) or a wrong unit, and one of them spoils a whole training sample.

    sensor    low..high      why                                               floor..ceiling
    s1_grd    -60..30 dB     calm water in VH -35, corner reflectors and ships  -150..100: 10 log10 of 1e-15 and 1e10
                             above 20; below -60 there is only noise
    s2_toa    0..28000       reflectance x 10000: clouds, snow and glint        none: int16 has no room for a fill value
                             under a low sun exceed 1 by far                    that is no reflectance; 0 is no data
    s3_olci   0..700         a white ground right under the sun returns         -10..920: the largest 16-bit number times
                             E0 / pi, about 640 mW m-2 sr-1 nm-1 at 480 nm      the largest scale factor is 914
    s5p_co    -0.05..1       clean air 0.03, fires 0.3 mol m-2; noise is signed -50..50: single retrievals fail that far
    s5p_no2   -6e-4..0.02    clean air 2e-5, cities 5e-4; noise is signed       -1..1
    s5p_o3    0.02..0.35     45 to 780 Dobson units (4.4615e-4 mol m-2 each)    -1..5: in Dobson units it would be 300
    s5p_so2   -0.02..0.5     noise of +-1 Dobson unit; eruptions 500 to 1000    -50..50
    dem       -500..9000 m   Dead Sea shore -430, Everest 8849                  -1000..10000: no data is -32767

Dates: a mission's first day is that of its launch (Sentinel-1A, -2A, -3A, -5P: European Space Agency).
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass

import numpy as np

from copernicus.datasets.sensors import Sensor


@dataclass(frozen=True)
class Plausible:
    """One row of the table above. ``launch``: None where images carry no date of theirs (the elevation model)."""

    low: float
    high: float
    floor: float
    ceiling: float
    launch: datetime.date | None


_S1, _S2 = datetime.date(2014, 4, 3), datetime.date(2015, 6, 23)
_S3, _S5P = datetime.date(2016, 2, 16), datetime.date(2017, 10, 13)

PLAUSIBLE: dict[str, Plausible] = {
    "s1_grd": Plausible(-60, 30, -150, 100, _S1),
    "s2_toa": Plausible(0, 28000, -math.inf, math.inf, _S2),
    "s3_olci": Plausible(0, 700, -10, 920, _S3),
    "s5p_co": Plausible(-0.05, 1, -50, 50, _S5P),
    "s5p_no2": Plausible(-6e-4, 0.02, -1, 1, _S5P),
    "s5p_o3": Plausible(0.02, 0.35, -1, 5, _S5P),
    "s5p_so2": Plausible(-0.02, 0.5, -50, 50, _S5P),
    "dem": Plausible(-500, 9000, -1000, 10000, None),
}


@dataclass(frozen=True)
class Values:
    """What an array holds, as it is stored. Shares are of 1: ``finite`` of all values, ``outside`` (of low..high) of the
    finite ones. ``lowest_C``, ``highest_C``: each band's, NaN where it has no value. ``impossible``: a value beyond floor
    or ceiling, in the sensor's units. ``images``, and how many of them are ``empty`` (no value), ``blank`` (one and the
    same number in each band)."""

    finite: float
    lowest_C: np.ndarray
    highest_C: np.ndarray
    outside: float
    impossible: float | None
    images: int
    empty: int
    blank: int

    @property
    def low(self) -> float | None:
        return None if np.isnan(self.lowest_C).all() else float(np.nanmin(self.lowest_C))

    @property
    def high(self) -> float | None:
        return None if np.isnan(self.highest_C).all() else float(np.nanmax(self.highest_C))

    @property
    def constant_C(self) -> np.ndarray:
        """Bands that hold one number only, over all images."""
        return self.lowest_C == self.highest_C


def measure(array: np.ndarray, sensor: Sensor) -> Values:
    """Compare a stored array, (..., C, H, W) or the elevation model's (H, W), with what its sensor can deliver.

    Looks at one image after another: the working memory is that of a single one.
    """
    expected = PLAUSIBLE[sensor.name]
    scale_C = np.broadcast_to(np.asarray(sensor.scale, np.float64), sensor.channels)
    low_C, high_C = expected.low / scale_C, expected.high / scale_C
    images = array.reshape(-1, sensor.channels, *array.shape[-2:])
    lowest_C, highest_C = np.full(sensor.channels, np.inf), np.full(sensor.channels, -np.inf)
    finite = outside = empty = blank = 0
    for image_CHW in images:
        known_CHW = np.isfinite(image_CHW)
        count = int(known_CHW.sum())
        finite += count
        if count == 0:
            empty += 1
            continue
        if count == image_CHW.size:
            least_C, most_C = (f(image_CHW, axis=(1, 2)).astype(np.float64) for f in (np.min, np.max))
        else:
            least_C = np.where(known_CHW, image_CHW, np.inf).min(axis=(1, 2)).astype(np.float64)
            most_C = np.where(known_CHW, image_CHW, -np.inf).max(axis=(1, 2)).astype(np.float64)
        blank += bool((least_C >= most_C).all())
        lowest_C, highest_C = np.minimum(lowest_C, least_C), np.maximum(highest_C, most_C)
        for c in np.flatnonzero((least_C < low_C) | (most_C > high_C)):
            band_HW = image_CHW[c]
            outside += int((((band_HW < low_C[c]) | (band_HW > high_C[c])) & known_CHW[c]).sum())
    seen_C = lowest_C <= highest_C
    lowest_C, highest_C = np.where(seen_C, lowest_C, np.nan), np.where(seen_C, highest_C, np.nan)
    extremes = np.concatenate([lowest_C, highest_C]) * np.tile(scale_C, 2)
    beyond = extremes[(extremes < expected.floor) | (extremes > expected.ceiling)]
    impossible = float(beyond[np.abs(beyond).argmax()]) if len(beyond) else None
    share = outside / finite if finite else 0.0
    return Values(finite / array.size, lowest_C, highest_C, share, impossible, len(images), empty, blank)
