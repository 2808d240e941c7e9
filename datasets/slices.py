"""Reading what one training draw uses out of the published shards: shards come from strangers.

A draw takes one local patch and one date of each sensor, reads these numbers alone (of the elevation model only the rows
that its crop needs), crops them, and returns arrays of fixed shape with a mask of the sensors that are there. Whatever
cannot be used is named in ``Draw.problems``, never raised and never dropped silently.

Shapes: C channels, H W stored pixels, S sensors, L tokens, M metadata fields (lon, lat, days, token area km^2).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from copernicus.datasets.augment import Crop, apply_crop, centre_crop, crop_metadata, random_crop
from copernicus.datasets.index import GridEntry
from copernicus.datasets.order import generator, uniform
from copernicus.datasets.pth import PthError, read_tensor
from copernicus.datasets.published import LAST_S5P, published_apply_crop, published_crop_metadata
from copernicus.datasets.raw import ImageError, read_image
from copernicus.datasets.sensors import InputError, Sensor
from copernicus.datasets.shards import LEADING_AXES, Problem
from copernicus.datasets.storage import File, Stamp, open_file
from copernicus.datasets.survey import SensorAt

DEM_DAYS = 16436.0
"""2015-01-01, the acquisition date the published pretraining gives the elevation model (days since 1970-01-01)."""


@dataclass
class Draw:
    """One training sample.

    images: sensor -> (C, size, size) float32, in the sensor's own units (not normalised), NaN where the image has none,
    zeros where the sensor is absent. noise: sensor -> (L,) float32 in 0-1, from which masking takes the tokens to keep.
    present: (S,) bool. metadata: (S, M) float32.
    """

    key: str
    images: dict[str, np.ndarray]
    noise: dict[str, np.ndarray]
    present: np.ndarray
    metadata: np.ndarray
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class Choice:
    """What one draw uses of a sensor: indices of patch and date, the crop, and the random numbers that follow it."""

    sensor: Sensor
    at: tuple[int, ...]
    crop: Crop
    rng: np.random.Generator
    where: SensorAt

    @property
    def rows(self) -> slice:
        """The image's rows to read: the crop's own where these lie in one piece (one band), else all."""
        top, height = self.crop.top, self.crop.height
        return slice(top, top + height) if self.sensor.channels == 1 else slice(0, self.where.shape[-2])

    @property
    def number(self) -> int:
        """Of the image among the sensor's, leading axes flattened."""
        return int(np.ravel_multi_index(self.at, self.where.shape[: len(self.at)])) if self.at else 0

    def span(self) -> tuple[int, int]:
        """(byte offset, length) of these rows in the shard."""
        shape, itemsize = self.where.shape, np.dtype(self.where.dtype).itemsize
        row = shape[-1] * itemsize
        first = (self.number * self.sensor.channels * shape[-2] + self.rows.start) * row
        return self.where.offset + first, self.sensor.channels * (self.rows.stop - self.rows.start) * row

    def image(self, data: bytes) -> np.ndarray:
        """The bytes of `span` as (C, rows, W)."""
        flat = np.frombuffer(data, np.dtype(self.where.dtype).newbyteorder("<"))
        return flat.reshape(self.sensor.channels, -1, self.where.shape[-1])


@dataclass(frozen=True)
class DrawReader:
    """Reads draws of fixed shape. ``sizes``: sensor -> side of the square the model sees, pixels. ``metadata_drop``: the
    probability with which place, time and area are each made unknown, per sensor and draw. ``s2_offset``: of raw images
    (see `baseline`). ``published``: crops are resampled and their metadata follow as in the public code (`published`).

    Raises:
        InputError: a size that is not a multiple of the sensor's patch kernel.
    """

    sensors: tuple[Sensor, ...]
    sizes: Mapping[str, int]
    seed: int = 0
    augment: bool = True
    metadata_drop: float = 0.0
    s2_offset: str = "auto"
    published: bool = False

    def __post_init__(self) -> None:
        for sensor in self.sensors:
            size = self.sizes[sensor.name]
            if size <= 0 or size % sensor.patch_kernel:
                raise InputError(
                    f"image size {size} of {sensor.name} is not a positive multiple of its patch kernel "
                    f"{sensor.patch_kernel}"
                )

    @property
    def row_bytes(self) -> int:
        """Of a batch's row, but for keys and problems."""
        return sum(column.nbytes for column in self._allocate(1)[0].values())

    def empty(self, key: str = "") -> Draw:
        """A sample with no sensor: the padding of a last batch, and what remains of a grid that cannot be read."""
        (sample,) = self._allocate(1)[1]
        sample.key = key
        return sample

    def choose(self, grid: GridEntry, epoch: int, draw: int = 0) -> dict[int, Choice]:
        """Number of the sensor -> what this draw uses of it; a function of (seed, epoch, draw, grid) alone."""
        # Radar and optical patches are mostly paired: one choice of patch for both keeps them so.
        patch = uniform("patch", self.seed, epoch, draw, grid.key)
        choices = {}
        for index, sensor in enumerate(self.sensors):
            where = grid.sensors.get(sensor.name)
            if where is None:
                continue
            rng = generator("crop", self.seed, epoch, draw, grid.key, sensor.name)
            leading = where.shape[: len(LEADING_AXES[sensor.name])]
            at: tuple[int, ...] = ()
            if leading:
                # Validation takes the first date, always.
                date = int(rng.integers(leading[-1])) if self.augment else 0
                at = (int(patch * leading[0]), date) if len(leading) == 2 else (date,)
            height, width = where.shape[-2:]
            crop = random_crop(rng, height, width) if self.augment else centre_crop(height, width)
            choices[index] = Choice(sensor, at, crop, rng, where)
        return choices

    def read(self, grid: GridEntry, epoch: int, draw: int = 0) -> Draw:
        """Read one draw of a grid; its randomness is keyed by (seed, epoch, draw, grid)."""
        sample = self.empty(grid.key)
        self._fill(sample, grid, epoch, draw)
        return sample

    def batch(self, draws: Sequence[tuple[GridEntry, int, int] | None]) -> dict[str, np.ndarray]:
        """Draws (grid, epoch, draw), None for an empty row, as columns of B rows: x_<sensor> (B, C, H, W),
        noise_<sensor> (B, L), present (B, S), metadata (B, S, M), epoch (-1 where empty), key, problems (JSON)."""
        columns, rows = self._allocate(len(draws))
        for row, place in zip(rows, draws, strict=True):
            if place is not None:
                row.key = place[0].key
                self._fill(row, *place)
        columns["epoch"] = np.array([-1 if place is None else place[1] for place in draws], np.int32)
        columns["key"] = np.array([row.key for row in rows])
        columns["problems"] = np.array([json.dumps([[p.where, p.reason, p.detail] for p in r.problems]) for r in rows])
        return columns

    def _allocate(self, count: int) -> tuple[dict[str, np.ndarray], list[Draw]]:
        """Columns of empty rows, and each row as a `Draw` that writes into them."""
        columns: dict[str, np.ndarray] = {}
        for s in self.sensors:
            size = self.sizes[s.name]
            columns[f"x_{s.name}"] = np.zeros((count, s.channels, size, size), np.float32)
            columns[f"noise_{s.name}"] = np.zeros((count, (size // s.patch_kernel) ** 2), np.float32)
        columns["present"] = np.zeros((count, len(self.sensors)), bool)
        columns["metadata"] = np.full((count, len(self.sensors), 4), np.nan, np.float32)
        rows = [
            Draw(
                "",
                {s.name: columns[f"x_{s.name}"][i] for s in self.sensors},
                {s.name: columns[f"noise_{s.name}"][i] for s in self.sensors},
                columns["present"][i],
                columns["metadata"][i],
            )
            for i in range(count)
        ]
        return columns, rows

    def _fill(self, sample: Draw, grid: GridEntry, epoch: int, draw: int) -> None:
        choices = self.choose(grid, epoch, draw)
        if any(choice.where.files for choice in choices.values()):
            loaded = load_raw(grid, choices, sample.problems, self.s2_offset)
        else:
            loaded = load_shard(grid, choices, sample.problems)
        resample = published_apply_crop if self.published else apply_crop
        for index, image_CHW in loaded.items():
            choice = choices[index]
            sensor = choice.sensor
            crop = dataclasses.replace(choice.crop, top=choice.crop.top - choice.rows.start)
            sample.images[sensor.name][:] = resample(image_CHW, crop, self.sizes[sensor.name])
            sample.present[index] = True
            sample.metadata[index] = self.locate(grid, choice, choices)
            if self.augment:
                unknown = choice.rng.random(3) < self.metadata_drop  # place, time, area
                sample.metadata[index, np.repeat(unknown, (2, 1, 1))] = np.nan
            choice.rng.random(dtype=np.float32, out=sample.noise[sensor.name])

    def locate(
        self, grid: GridEntry, choice: Choice, choices: Mapping[int, Choice]
    ) -> tuple[float, float, float, float]:
        """lon, lat (degrees), days since 1970-01-01 and token area (km^2) of what a choice shows; NaN where unknown.

        ``choices``: of all sensors of the draw."""
        sensor, where, at = choice.sensor, choice.where, choice.at
        lon, lat = grid.lon, grid.lat
        if len(at) == 2 and where.lon[at[0]] is not None:
            lon, lat = where.lon[at[0]], where.lat[at[0]]  # type: ignore[assignment]
        days: float | None = DEM_DAYS
        if at:
            days = where.days[choice.number]
        # A smaller stored image (the miniature Earth's) shows less ground; its pixels are as large as the sensor's spec says.
        height, width = where.shape[-2:]
        size = self.sizes[sensor.name]
        days = float("nan") if days is None else days
        if self.published:
            if sensor.name.startswith("s5p_"):  # all four go by the crop of the last, where the grid has it
                choice = next((c for c in choices.values() if c.sensor.name == LAST_S5P), choice)
            shape = choice.where.shape[-2:]
            lon, lat, area = published_crop_metadata(lon, lat, sensor.gsd_m, sensor.patch_kernel, choice.crop, *shape)
            return lon, lat, days, area
        lon, lat, area = crop_metadata(lon, lat, sensor.gsd_m, sensor.patch_kernel, choice.crop, height, width, size)
        return lon, lat, days, area


def load_shard(grid: GridEntry, choices: Mapping[int, Choice], problems: list[Problem]) -> dict[int, np.ndarray]:
    """The chosen rows of each image, (C, rows, W) as stored."""
    images: dict[int, np.ndarray] = {}
    try:
        file = _unchanged(grid.shard, grid.stamp)
    except OSError as error:
        reason = "changed" if isinstance(error, ChangedError) else "unreadable"
        problems.append(Problem(f"{grid.shard}:{grid.key}", reason, str(error)))
        return images
    sliced = {index: choice for index, choice in choices.items() if not choice.where.whole}
    try:
        pieces = file.read_ranges([choice.span() for choice in sliced.values()])
        images = {index: sliced[index].image(data) for index, data in zip(sliced, pieces, strict=True)}
        rest = [index for index in choices if index not in sliced]
    except OSError:
        rest = list(choices)  # one by one, to see which of them it is
    for index in rest:
        choice = choices[index]
        try:
            images[index] = _alone(file, choice)
        except PthError as error:
            problems.append(Problem(_where(grid, choice), error.reason, str(error)))
        except OSError as error:
            problems.append(Problem(_where(grid, choice), "unreadable", str(error)))
    for index, image in list(images.items()):
        if not _any_finite(image) and not _finite_elsewhere(file, choices[index]):
            where = _where(grid, choices[index])
            problems.append(Problem(where, "all_nan", f"patch and date {list(choices[index].at)}"))
            del images[index]
    return images


def load_raw(
    grid: GridEntry, choices: Mapping[int, Choice], problems: list[Problem], s2_offset: str
) -> dict[int, np.ndarray]:
    """As `load_shard`, from the raw layout's files."""
    images: dict[int, np.ndarray] = {}
    for index, choice in choices.items():
        name, size = choice.where.files[choice.number], choice.where.shape[-1]
        path = Path(grid.shard) / name
        try:
            image = read_image(path, choice.sensor.name, size, s2_offset, (choice.rows.start, choice.rows.stop))
            if not _any_finite(image):
                read_image(path, choice.sensor.name, size, s2_offset)  # raises where nothing else is valid either
            images[index] = image
        except (ImageError, OSError) as error:
            reason = error.reason if isinstance(error, ImageError) else "unreadable"
            where = f"{grid.shard}:{grid.key}.{choice.sensor.name}:{name}"
            problems.append(Problem(where, reason, str(error)))
    return images


def _alone(file: File, choice: Choice) -> np.ndarray:
    """One image's rows; of a member that cannot be sliced (compressed, not contiguous) the whole is read.

    Raises:
        PthError: the member is not what the index says. OSError: it cannot be read.
    """
    if not choice.where.whole:
        return choice.image(file.read(*choice.span()))
    array = read_tensor(file.read, choice.where.member, choice.where.size)
    if array.shape != choice.where.shape or array.dtype.name != choice.where.dtype:
        raise PthError(f"{array.dtype} {array.shape}, the index says {choice.where.dtype} {choice.where.shape}")
    image = array[choice.at] if choice.at else array
    return np.ascontiguousarray((image if image.ndim == 3 else image[None])[:, choice.rows])


def _any_finite(image_CHW: np.ndarray) -> bool:
    if image_CHW.dtype.kind != "f":
        return True
    # A few pixels settle it for nearly every image.
    return bool(np.isfinite(image_CHW[:, ::31, ::31]).any() or np.isfinite(image_CHW).any())


def _finite_elsewhere(file: File, choice: Choice) -> bool:
    """Whether an image whose crop shows nothing has a valid pixel in the rows that were not read."""
    height, width = choice.where.shape[-2:]
    if choice.rows == slice(0, height):
        return False
    whole = dataclasses.replace(choice, crop=Crop(0, 0, height, width))
    try:
        return _any_finite(_alone(file, whole))
    except (OSError, PthError):
        return False


def _where(grid: GridEntry, choice: Choice) -> str:
    return f"{grid.shard}:{grid.key}.{choice.sensor.name}.pth"


class ChangedError(OSError):
    """A shard is not the one that was indexed."""


def _unchanged(uri: str, stamp: Stamp) -> File:
    """The shard, if it is still the one that was indexed: offsets into another would give wrong numbers in silence.

    A local file is looked at for every draw (microseconds), a remote one every ten minutes by each process.
    """
    file = open_file(uri)
    found = file.stamp() if "://" not in uri else _remote_stamp(uri, int(time.monotonic() // 600))
    if found != stamp:
        raise ChangedError(f"it has changed since it was indexed: {found} now, {stamp} then")
    return file


@functools.lru_cache(maxsize=4096)
def _remote_stamp(uri: str, period: int) -> Stamp:
    return open_file(uri).stamp()
