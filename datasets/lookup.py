"""Which of some shards holds a grid."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from copernicus.datasets.index import default_path, read_index, survey_or_fault
from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import grid_center, grid_index, grid_key
from copernicus.datasets.storage import stamps
from copernicus.datasets.survey import GridSurvey

_NEAR = 5
_READERS = 8  # of shards, side by side


def parse_grid(text: str) -> str:
    """A grid's key from its seven digits, or from a place, ``LON,LAT`` in degrees, whose nearest grid it is.

    Raises:
        InputError: it is neither.
    """
    number = r"\s*([+-]?\d+(?:\.\d*)?)\s*"
    if place := re.fullmatch(f"{number},{number}", text):
        lon, lat = float(place[1]), float(place[2])
        if not -180 <= lon <= 360:
            raise InputError(f"grid {text!r}: longitude {lon:g} is outside -180..360 degrees (write LON,LAT)")
        return grid_key(grid_index(lon, lat))
    if not re.fullmatch(r"\d{7}", text):
        raise InputError(
            f"grid {text!r}: write its seven digits, as in 0200599, or a place, LON,LAT as in -70.25,-55.25"
        )
    grid_center(int(text))
    return text


def find_grid(key: str, shards: Sequence[str], progress: Callable[[float, float, str], None]) -> tuple[str, GridSurvey]:
    """The first shard that holds a grid, and where its sensors' numbers lie in it. The index next to the shards, where
    there is one, says where to look first.

    Args:
        shards: as `storage.expand` lists them.
        progress: called with shards looked at, shards in all, and a note.

    Raises:
        InputError: none of them holds it; the message names grids near it that are there.
    """
    told = _told_by_index(key, shards)
    for uri in told:
        if found := _within(key, uri)[0]:
            return uri, found
    keys: set[str] = set()
    rest = [uri for uri in shards if uri not in told]
    with ThreadPoolExecutor(_READERS) as pool:
        for done, (uri, (grid, others)) in enumerate(
            zip(rest, pool.map(lambda uri: _within(key, uri), rest), strict=True)
        ):
            if grid is not None:
                pool.shutdown(wait=False, cancel_futures=True)
                return uri, grid
            keys |= others
            progress(done + 1, len(rest), "")
    raise InputError(f"grid {key} is in none of the {len(shards)} shards, which hold {_near(key, keys)}")


def _told_by_index(key: str, shards: Sequence[str]) -> list[str]:
    try:
        path = default_path(shards)
        table = read_index(path) if stamps([path])[0] is not None else None
    except (InputError, OSError):  # several folders, or an index that cannot be read: it would only have been quicker
        return []
    if table is None:
        return []
    told = {row["shard"] for row in table.select(["shard", "grid"]).to_pylist() if row["grid"] == key}
    return [uri for uri in shards if uri in told]


def _within(key: str, uri: str) -> tuple[GridSurvey | None, set[str]]:
    grids = {grid.key: grid for grid in survey_or_fault(uri).grids}
    return grids.get(key), set(grids)


def _near(key: str, keys: set[str]) -> str:
    """Such as ``9 grids, the nearest: 0200600 (0.25 degrees away)``."""
    there = sorted(k for k in keys if re.fullmatch(r"\d{7}", k))
    if not there:
        return "no grid at all"
    lon, lat = np.radians([grid_center(int(k)) for k in there]).T
    east, north = np.radians(grid_center(int(key)))
    cosine = np.sin(lat) * np.sin(north) + np.cos(lat) * np.cos(north) * np.cos(lon - east)
    degrees = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    near = [f"{there[i]} ({degrees[i]:.2f})" for i in np.argsort(degrees, kind="stable")[:_NEAR]]
    return f"{len(keys)} grids; the nearest (degrees away): {', '.join(near)}"
