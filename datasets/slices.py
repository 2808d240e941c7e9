"""Reading what one training draw uses out of the published shards, safely: shards come from strangers.

A draw takes one local patch and one date of each sensor, crops it, and returns arrays of fixed shape with a mask of the
sensors that are there. Whatever cannot be used is named in ``Draw.problems``, never raised and never dropped silently.

Shapes: C channels, H W stored pixels, S sensors, L tokens, M metadata fields (lon, lat, days, token area km^2).
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from copernicus.datasets.augment import Crop, apply_crop, centre_crop, crop_metadata, random_crop
from copernicus.datasets.expand import expand
from copernicus.datasets.order import generator
from copernicus.datasets.sensors import InputError, Sensor
from copernicus.datasets.shards import (
    LEADING_AXES,
    Problem,
    grid_center,
    list_members,
    parse_image_name,
)

DEM_DAYS = 16436.0
"""2015-01-01, the acquisition date the published pretraining gives the elevation model (days since 1970-01-01)."""


@dataclass(frozen=True)
class GridEntry:
    """Where one grid's members lie: extension -> (byte offset, size) in the shard."""

    key: str
    shard: str
    members: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class GridIndex:
    """All usable grids of a set of shards, in shard order, and what could not be used."""

    grids: tuple[GridEntry, ...]
    problems: tuple[Problem, ...]
    fingerprint: str  # of names and sizes: the same data gives the same value anywhere

    def split(self, fraction: float, seed: int) -> tuple[GridIndex, GridIndex]:
        """(training, held-out) grids. A grid's side depends on (seed, its key) alone, so it never changes sides when
        shards are added. At least one grid is held out when ``fraction`` > 0."""
        score = [generator("held-out", seed, grid.key).random() for grid in self.grids]
        held = {i for i, s in enumerate(score) if s < fraction}
        if fraction > 0 and not held:
            held = {int(np.argmin(score))}
        part = [tuple(g for i, g in enumerate(self.grids) if (i in held) == side) for side in (False, True)]
        return GridIndex(part[0], self.problems, self.fingerprint), GridIndex(part[1], (), self.fingerprint)


def index_shards(shards: str | Sequence[str], sensors: Sequence[str]) -> GridIndex:
    """Find every grid of the shards by their tar headers.

    Grids without a JSON member, and what a truncated shard cuts off, are listed in ``problems``.

    Raises:
        InputError: no such shard, or no grid that has one of ``sensors``.
    """
    paths = expand(shards if isinstance(shards, str) else list(shards))
    grids: list[GridEntry] = []
    problems: list[Problem] = []
    digest = hashlib.sha256()
    for path in paths:
        members, faults = list_members(path)
        problems += [Problem(path, "truncated_tar", str(fault)) for fault in faults]
        name = path.rsplit("/", 1)[-1]
        for key, entries in members.items():
            digest.update(json.dumps([name, key, sorted((e, s) for e, (_, s) in entries.items())]).encode())
            if "json" not in entries:
                problems.append(Problem(f"{path}:{key}", "missing_json"))
                continue
            kept = {e.removesuffix(".pth"): where for e, where in entries.items()}
            if any(sensor in kept for sensor in sensors):
                grids.append(GridEntry(key, path, kept))
    if not grids:
        seen = "; ".join(str(p) for p in problems[:3]) or "the shards hold none"
        raise InputError(f"no grid with any of the sensors {', '.join(sensors)} in {shards}: {seen}")
    return GridIndex(tuple(grids), tuple(problems), digest.hexdigest()[:16])


@dataclass
class Draw:
    """One training sample.

    images: sensor -> (C, size, size) float32, normalised, zeros where absent. noise: sensor -> (L,) float32 in 0-1, from
    which masking takes the tokens to keep. present: (S,) bool. metadata: (S, M) float32.
    """

    key: str
    images: dict[str, np.ndarray]
    noise: dict[str, np.ndarray]
    present: np.ndarray
    metadata: np.ndarray
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class DrawReader:
    """Reads draws of fixed shape. ``sizes``: sensor -> side of the square the model sees, pixels. ``metadata_drop``: the
    probability with which place, time and area are each made unknown, per sensor and draw.

    Raises:
        InputError: a size that is not a multiple of the sensor's patch kernel.
    """

    sensors: tuple[Sensor, ...]
    sizes: Mapping[str, int]
    seed: int = 0
    augment: bool = True
    metadata_drop: float = 0.0

    def __post_init__(self) -> None:
        for sensor in self.sensors:
            if self.sizes[sensor.name] % sensor.patch_kernel:
                raise InputError(
                    f"image size {self.sizes[sensor.name]} of {sensor.name} is not a multiple of its patch kernel "
                    f"{sensor.patch_kernel}"
                )

    def empty(self, key: str = "") -> Draw:
        """A sample with no sensor: the padding of a last batch, and what remains of a grid that cannot be read."""
        images = {
            s.name: np.zeros((s.channels, self.sizes[s.name], self.sizes[s.name]), np.float32) for s in self.sensors
        }
        count = len(self.sensors)
        noise = {s.name: np.zeros((self.sizes[s.name] // s.patch_kernel) ** 2, np.float32) for s in self.sensors}
        return Draw(key, images, noise, np.zeros(count, bool), np.full((count, 4), np.nan, np.float32))

    def read(self, grid: GridEntry, epoch: int, draw: int = 0) -> Draw:
        """Read one draw of a grid; its randomness is keyed by (seed, epoch, draw, grid)."""
        sample = self.empty(grid.key)
        try:
            with open(grid.shard, "rb") as shard:
                names = json.loads(_read(shard, grid.members["json"]))
                if not isinstance(names, dict):
                    raise ValueError("not an object")
        except OSError as error:
            sample.problems.append(Problem(f"{grid.shard}:{grid.key}.json", "unreadable", str(error)))
            return sample
        except (ValueError, RecursionError) as error:
            sample.problems.append(Problem(f"{grid.shard}:{grid.key}.json", "bad_json", str(error)))
            return sample
        # Radar and optical patches are mostly paired: one choice of patch for both keeps them so.
        patch = float(generator("patch", self.seed, epoch, draw, grid.key).random())
        for index, sensor in enumerate(self.sensors):
            if sensor.name not in grid.members:
                continue
            rng = generator("crop", self.seed, epoch, draw, grid.key, sensor.name)
            where = f"{grid.shard}:{grid.key}.{sensor.name}.pth"
            try:
                with open(grid.shard, "rb") as shard:
                    array = decode_member(_read(shard, grid.members[sensor.name]), sensor)
            except MemberError as error:
                sample.problems.append(Problem(where, error.reason, str(error)))
                continue
            except OSError as error:
                sample.problems.append(Problem(where, "unreadable", str(error)))
                continue
            at = self._choose(array, sensor, patch, rng)
            x_CHW = array[at] if at else array
            if x_CHW.ndim == 2:
                x_CHW = x_CHW[None]
            if x_CHW.is_floating_point() and not torch.isfinite(x_CHW).any():
                sample.problems.append(Problem(where, "all_nan", f"patch and date {list(at)}"))
                continue
            height, width = x_CHW.shape[-2:]
            crop = random_crop(rng, height, width) if self.augment else centre_crop(height, width)
            size = self.sizes[sensor.name]
            image = sensor.normalize(apply_crop(x_CHW, crop, size)).numpy()
            try:
                row = self._metadata(grid, sensor, names, at, crop, height, width)
            except InputError as error:
                sample.problems.append(Problem(where, "bad_json", str(error)))
                continue
            sample.images[sensor.name] = image
            sample.present[index] = True
            sample.metadata[index] = row
            if self.augment:
                unknown = rng.random(3) < self.metadata_drop  # place, time, area
                sample.metadata[index, np.repeat(unknown, (2, 1, 1))] = np.nan
            tokens = len(sample.noise[sensor.name])
            mask_rng = generator("mask", self.seed, epoch, draw, grid.key, sensor.name)
            sample.noise[sensor.name] = mask_rng.random(tokens, dtype=np.float32)
        return sample

    def _choose(self, array: torch.Tensor, sensor: Sensor, patch: float, rng: np.random.Generator) -> tuple[int, ...]:
        leading = array.shape[: len(LEADING_AXES[sensor.name])]
        if not leading:
            return ()
        # Validation takes the first date, always.
        date = int(rng.integers(leading[-1])) if self.augment else 0
        return (int(patch * leading[0]), date) if len(leading) == 2 else (date,)

    def _metadata(
        self, grid: GridEntry, sensor: Sensor, names: dict, at: tuple[int, ...], crop: Crop, height: int, width: int
    ) -> tuple[float, float, float, float]:
        lon, lat, days = image_metadata(names.get(sensor.name), at)
        if np.isnan(lon) or np.isnan(lat):
            if not grid.key.isdecimal():
                raise InputError(f"no image name, and the key {grid.key!r} is no grid number")
            lon, lat = grid_center(int(grid.key))
        if sensor.name == "dem":
            days = DEM_DAYS
        # A smaller stored image (the miniature Earth's) shows less ground; its pixels are as large as the sensor's spec says.
        size = self.sizes[sensor.name]
        lon, lat, area = crop_metadata(lon, lat, sensor.gsd_m, sensor.patch_kernel, crop, height, width, size)
        return lon, lat, days, area


class MemberError(Exception):
    """A member that cannot be used; ``reason`` is its short name."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def decode_member(data: bytes, sensor: Sensor) -> torch.Tensor:
    """The tensor in a ``.pth`` member, read without running anything in it.

    Raises:
        MemberError: not a plain tensor (a pickle that wants to run something is refused, not run), or its axes are not
            the published ones for this sensor.
    """
    try:
        array = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; every one of them means the same to us
        message = str(error).strip().splitlines()
        raise MemberError("unsafe_or_broken_pth", message[0][:200] if message else type(error).__name__) from None
    if not isinstance(array, torch.Tensor):
        raise MemberError("unsafe_or_broken_pth", f"holds a {type(array).__name__}, not a tensor")
    if array.layout != torch.strided or array.device.type != "cpu" or array.is_complex() or array.is_quantized:
        kind = f"{array.layout} tensor of {array.dtype} on {array.device}"
        raise MemberError("unsafe_or_broken_pth", f"holds a {kind}, not a plain one of real numbers")
    leading = len(LEADING_AXES[sensor.name])
    expected = leading + (2 if sensor.name == "dem" else 3)
    channels_fit = sensor.name == "dem" or (array.ndim == expected and array.shape[-3] == sensor.channels)
    if array.ndim != expected or not channels_fit or 0 in array.shape:
        raise MemberError(
            "wrong_shape", f"shape {tuple(array.shape)}, expected {expected} axes, {sensor.channels} channels"
        )
    return array


def image_metadata(names: Any, at: Sequence[int]) -> tuple[float, float, float]:
    """(lon, lat, days) of the image at those leading indices, NaN where the JSON does not say."""
    for index in at:
        names = names[index] if isinstance(names, list) and index < len(names) else None
    while isinstance(names, list) and len(names) == 1:  # published strings come wrapped in one-element lists
        names = names[0]
    if not isinstance(names, str):
        return float("nan"), float("nan"), float("nan")
    name = parse_image_name(names)
    return name.lon, name.lat, name.days


def collate(draws: Sequence[Draw], sensors: Sequence[Sensor]) -> dict[str, np.ndarray]:
    """Columns of a batch of B draws: x_<sensor> (B, C, H, W), noise_<sensor> (B, L), present (B, S), metadata (B, S, M),
    key, problems (JSON)."""
    columns = {f"x_{s.name}": np.stack([d.images[s.name] for d in draws]) for s in sensors}
    columns |= {f"noise_{s.name}": np.stack([d.noise[s.name] for d in draws]) for s in sensors}
    columns["present"] = np.stack([d.present for d in draws])
    columns["metadata"] = np.stack([d.metadata for d in draws])
    columns["key"] = np.array([d.key for d in draws])
    columns["problems"] = np.array([json.dumps([[p.where, p.reason, p.detail] for p in d.problems]) for d in draws])
    return columns


def _read(shard: io.BufferedReader, where: tuple[int, int]) -> bytes:
    offset, size = where
    shard.seek(offset)
    data = shard.read(size)
    if len(data) != size:
        raise OSError(f"{len(data)} of {size} bytes at {offset}: the file is shorter than its headers say")
    return data
