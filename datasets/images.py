"""Every image of a grid, each once and whole: what an embedding is of (a pretraining draw takes one of each sensor).

Places with fewer than the published number of dates repeat some of them in the shards; an image that comes again, the
same patch on the same date, is left out.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import product

import numpy as np

from copernicus.datasets.augment import Crop, apply_crop, centre_crop
from copernicus.datasets.index import GridEntry
from copernicus.datasets.order import generator
from copernicus.datasets.sensors import Sensor
from copernicus.datasets.shards import LEADING_AXES, Problem, date_string, grid_name
from copernicus.datasets.slices import Choice, DrawReader, load_raw, load_shard
from copernicus.datasets.survey import SensorAt


@dataclass(frozen=True)
class ImageKey:
    """What an image is called in the embedding product. ``local``, ``date`` (YYYYMMDD): None where it has none."""

    grid: str
    modality: str
    local: str | None
    date: str | None


@dataclass(frozen=True)
class GridImage:
    """One image. ``sensor``: its number among the reader's; ``pixels``: (C, size, size) float32 in the sensor's own units,
    NaN where it has none; ``metadata``: lon, lat (degrees), days since 1970-01-01, token area (km^2), NaN where unknown.
    """

    key: ImageKey
    sensor: int
    pixels: np.ndarray
    metadata: tuple[float, float, float, float]


def image_choices(reader: DrawReader, grid: GridEntry) -> list[tuple[ImageKey, int, Choice]]:
    """All images of a grid in order of sensor, patch and date: what each is called, the number of its sensor, and where
    it lies."""
    name = grid_name(int(grid.key))
    unused = generator("images")
    found: dict[tuple, tuple[ImageKey, int, Choice]] = {}
    for number, sensor in enumerate(reader.sensors):
        where = grid.sensors.get(sensor.name)
        if where is None:
            continue
        leading = where.shape[: len(LEADING_AXES[sensor.name])]
        crop = centre_crop(*where.shape[-2:])
        for at in product(*map(range, leading)):
            choice = Choice(sensor, at, crop, unused, where)
            key = _key(name, sensor, where, choice)
            # A raw image is its file; of a shard's images whose name tells no date each is one of its own.
            same: object = key.date if key.date is not None or not at else choice.number
            if where.files:
                same = where.files[choice.number]
            found.setdefault((number, at[0] if len(at) == 2 else None, same), (key, number, choice))
    return list(found.values())


def read_images(reader: DrawReader, grid: GridEntry) -> tuple[list[GridImage], list[Problem], int]:
    """Read all images of a grid as validation sees them (the largest centred square, resampled to the reader's size), what
    could not be used, and how many images there should be."""
    problems: list[Problem] = []
    listed = image_choices(reader, grid)
    choices = {row: choice for row, (_, _, choice) in enumerate(listed)}
    if any(choice.where.files for choice in choices.values()):
        loaded = load_raw(grid, choices, problems, reader.s2_offset)
    else:
        loaded = load_shard(grid, choices, problems)
    images = []
    for row, (key, number, choice) in enumerate(listed):
        if row in loaded:
            pixels = apply_crop(loaded.pop(row), _within(choice), reader.sizes[choice.sensor.name])
            images.append(GridImage(key, number, pixels, reader.locate(grid, choice, choices)))
    return images, problems, len(listed)


def _within(choice: Choice) -> Crop:
    """The crop in the rows that were read."""
    return dataclasses.replace(choice.crop, top=choice.crop.top - choice.rows.start)


def _key(grid: str, sensor: Sensor, where: SensorAt, choice: Choice) -> ImageKey:
    local = None
    if len(choice.at) == 2:
        patch = choice.at[0]
        local = where.local[patch] if where.local else f"{patch}"
        if where.lon and (lon := where.lon[patch]) is not None and (lat := where.lat[patch]) is not None:
            local = f"{local}_{_degrees(lon)}_{_degrees(lat)}"
    days = where.days[choice.number] if choice.at and where.days else None
    return ImageKey(grid, sensor.name, local, None if days is None else date_string(days))


def _degrees(value: float) -> str:
    """As names have it: two decimals, or as many more as were given."""
    short = f"{value:.2f}"
    return short if float(short) == value else repr(value)
