"""Whether the names of a sensor's images agree with the array, the grid, the mission and the calendar.

A name is ``<grid>[/<patch>][/<YYYYMMDD>]``, grid and patch each ``<id>_<lon>_<lat>``; a grid's id is
``round((lat + 90) / 0.25) * 1440 + round((lon + 180) / 0.25)``. Dates that are there more than once are usual: places
with fewer than the published number of dates repeat some.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from copernicus.datasets.plausible import PLAUSIBLE
from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import (
    GRID_COLUMNS,
    GRID_DEGREES,
    GRID_ROWS,
    ImageName,
    date_string,
    grid_center,
    grid_name,
    parse_image_name,
)

PATCH_DEGREES = 0.25
"""A patch lies at most this far from its grid's node, in longitude and in latitude: half of it is the grid's own cell, the
rest for patches that reach over its edge."""

_ROUNDED = 0.0051  # coordinates in names have two decimals, or more
_EPOCH = datetime.date(1970, 1, 1)

Say = Callable[[str, str], None]
"""Called with a reason's short name and what it is in words."""


def grid_number(key: str) -> int | None:
    """The number that a grid's key stands for; None: it is not one of seven digits on the globe."""
    fits = re.fullmatch(r"\d{7}", key) and int(key) < GRID_ROWS * GRID_COLUMNS
    return int(key) if fits else None


def check_names(
    names: Any, sensor: str, key: str, shape: Sequence[int], today: datetime.date, fault: Say, note: Say
) -> None:
    """Compare a sensor's names, as the grid's JSON nests them, with what they should be.

    Args:
        key: of the grid.
        shape: of the array's leading axes: (patch, date), (date,) or ().
        today: the last day of which an image can be.
        fault, note: called once for each kind of thing that is wrong, or only worth knowing.
    """
    try:
        flat = list(_flat(names, shape))
    except ValueError as error:
        return fault("bad_nesting", str(error))
    images: list[ImageName] = []
    for name in flat:
        try:
            images.append(parse_image_name(name))
        except InputError as error:
            return fault("bad_json", str(error))
    number = grid_number(key)
    if number is not None:
        for image in images:
            if wrong := _wrong_grid(image.grid, number):
                fault("wrong_grid", wrong)
                break
        if len(shape) == 2:
            _check_places(images, number, fault)
    if shape:
        _check_dates([None if math.isnan(i.days) else int(i.days) for i in images], sensor, shape, today, fault, note)
    return None


def _flat(names: Any, shape: Sequence[int], where: str = "") -> Iterator[str]:
    """The names in the order of the array's leading axes.

    Raises:
        ValueError: they do not nest like these.
    """
    if not shape:
        while isinstance(names, list) and len(names) == 1:  # published strings come wrapped in one-element lists
            names = names[0]
        if not isinstance(names, str):
            raise ValueError(f"no name of the image{where}")
        yield names
        return
    if not isinstance(names, list) or len(names) != shape[0]:
        found = f"{len(names)} entries" if isinstance(names, list) else "no list"
        raise ValueError(f"{found}{where} where the array has {shape[0]} {'patches' if len(shape) == 2 else 'dates'}")
    what = "patch" if len(shape) == 2 else "date"
    for number, inner in enumerate(names):
        yield from _flat(inner, shape[1:], f"{where or ' at'} {what} {number}")


def _wrong_grid(name: str, number: int) -> str | None:
    """What is wrong with the grid's part of a name."""
    lon, lat = grid_center(number)
    try:
        named = parse_image_name(name)
    except InputError:
        return f"{name[:80]!r} is no grid's name; it should be {grid_name(number)}"
    if name.split("_", 1)[0] != f"{number:07d}":
        return f"named {name[:80]}, it should be {grid_name(number)}"
    if max(_apart(named.lon, lon), abs(named.lat - lat)) > _ROUNDED:
        return f"named {name[:80]}, but grid {number:07d} lies at {lon:.2f}, {lat:.2f}"
    return None


def _check_places(images: Sequence[ImageName], number: int, fault: Say) -> None:
    lon, lat = grid_center(number)
    for image in images:
        east, north = _apart(image.lon, lon), abs(image.lat - lat)
        if max(east, north) > PATCH_DEGREES + 1e-9:
            return fault(
                "far_patch",
                f"patch at {image.lon:.4f}, {image.lat:.4f} lies {max(east, north):.2f} degrees from the grid's node "
                f"{lon:.2f}, {lat:.2f}; cells are {GRID_DEGREES} degrees wide",
            )
    return None


def _apart(first: float, second: float) -> float:
    """Degrees of longitude between two meridians."""
    return abs((first - second + 180) % 360 - 180)


def _check_dates(
    days: Sequence[int | None], sensor: str, shape: Sequence[int], today: datetime.date, fault: Say, note: Say
) -> None:
    known = [d for d in days if d is not None]
    launch = PLAUSIBLE[sensor].launch
    if launch is not None and (early := [d for d in known if d < (launch - _EPOCH).days]):
        fault("wrong_date", f"{date_string(min(early))} is before the launch of {launch:%Y%m%d}")
    elif late := [d for d in known if d > (today - _EPOCH).days]:
        fault("wrong_date", f"{date_string(max(late))} is in the future")
    if len(known) < len(days):
        note("no_date", f"{len(days) - len(known)} of {len(days)} images name no date")
    rows = [[d for d in days[i : i + shape[-1]] if d is not None] for i in range(0, len(days), shape[-1])]
    repeated = sum(len(row) - len(set(row)) for row in rows)
    if repeated:
        note("repeated_dates", f"{repeated} of {len(days)} images have the date of another of their place")
