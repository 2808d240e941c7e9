"""Shards to read: published axes and format, filled with noise, and where in them a draw's bytes lie."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import (
    LEADING_AXES,
    STORED_DTYPE,
    Grid,
    grid_center,
    grid_key,
    grid_name,
    patch_name,
    shard_path,
    write_shards,
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """Sizes of a grid's arrays. stored: sensor -> side of the stored images, crop: of those a model sees."""

    patches: int
    dates: dict[str, int]
    stored: dict[str, int]
    crop: dict[str, int]

    def shape(self, sensor: str) -> tuple[int, ...]:
        leading = tuple(self.patches if axis == "patch" else self.dates[sensor] for axis in LEADING_AXES[sensor])
        band = () if sensor == "dem" else (SENSORS[sensor].channels,)
        return (*leading, *band, self.stored[sensor], self.stored[sensor])

    def used_bytes(self, sensor: str) -> int:
        """Of one patch and one date."""
        return int(np.prod(self.shape(sensor)[len(LEADING_AXES[sensor]) :])) * STORED_DTYPE[sensor].itemsize

    @property
    def sample_bytes(self) -> int:
        return sum(self.used_bytes(sensor) for sensor in SENSORS)

    @property
    def grid_bytes(self) -> int:
        return sum(int(np.prod(self.shape(sensor))) * STORED_DTYPE[sensor].itemsize for sensor in SENSORS)


_DATES = {name: 4 if name in ("s1_grd", "s2_toa") else 8 if name == "s3_olci" else 12 for name in SENSORS}
PUBLISHED = Layout(
    4, _DATES, {n: s.stored_size for n, s in SENSORS.items()}, {n: s.image_size for n, s in SENSORS.items()}
)
"""The full sizes: 47.9 MB a grid, of which a draw uses 6.84 MB."""
_KERNELS = {name: sensor.patch_kernel for name, sensor in SENSORS.items()}
SMALL = Layout(1, dict.fromkeys(SENSORS, 2), {n: k + k // 4 for n, k in _KERNELS.items()}, _KERNELS)
"""One token a sensor."""


def make_shards(folder: Path, layout: Layout, grids: int, grids_per_shard: int) -> tuple[str, ...]:
    return tuple(str(path) for path in write_shards(_grids(layout, grids), folder, grids_per_shard))


def repeat_shard(shard: str, folder: Path, count: int) -> tuple[str, ...]:
    """So many shards of the same arrays under other keys: quick to make, and no key twice."""
    with tarfile.open(shard) as tar:
        members = [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]
    numbers = {key: i for i, key in enumerate(sorted({name.partition(".")[0] for name, _ in members}))}
    folder.mkdir()
    paths = tuple(str(shard_path(folder, number)) for number in range(count))
    for number, path in enumerate(paths):
        with tarfile.open(path, "w") as tar:
            for name, data in members:
                key, _, extension = name.partition(".")
                member = tarfile.TarInfo(f"{grid_key(number * len(numbers) + numbers[key])}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return paths


def _grids(layout: Layout, count: int) -> Iterator[Grid]:
    rng = np.random.default_rng(0)
    largest = max(int(np.prod(layout.shape(name))) for name in SENSORS)
    noise = rng.standard_normal(2 * largest, np.float32)
    whole = (noise * 300 + 1500).astype(np.int16)
    for number in range(count):
        index = 200_000 + number * 97
        arrays = {}
        for name in SENSORS:
            shape = layout.shape(name)
            first = int(rng.integers(largest))  # another piece of the same noise: cheap, and no two are equal
            pool = whole if STORED_DTYPE[name].kind == "i" else noise
            arrays[name] = pool[first : first + int(np.prod(shape))].reshape(shape)
        yield Grid(grid_key(index), arrays, {name: _names(layout, name, index) for name in SENSORS})


def _names(layout: Layout, sensor: str, index: int) -> list:
    grid = grid_name(index)
    dates = [f"2021{1 + i:02d}15" for i in range(layout.dates[sensor])]
    axes = LEADING_AXES[sensor]
    if not axes:
        return [grid]
    if len(axes) == 1:
        return [f"{grid}/{date}" for date in dates]
    return [[f"{grid}/{patch_name(p, *grid_center(index))}/{date}" for date in dates] for p in range(layout.patches)]


def data_offsets(shard: str) -> list[dict[str, int]]:
    """Per grid: sensor -> byte at which the numbers of its array begin. By tarfile and zipfile, not by our reader."""
    grids: dict[str, dict[str, int]] = {}
    with tarfile.open(shard) as tar, open(shard, "rb") as file:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if not extension.endswith(".pth"):
                continue
            with zipfile.ZipFile(tar.extractfile(member)) as archive:  # type: ignore[arg-type]
                entry = next(e for e in archive.infolist() if e.filename.endswith("/data/0"))
            # A local header has 30 bytes, then a name and an extra field whose lengths stand at 26 and 28.
            file.seek(member.offset_data + entry.header_offset + 26)
            name, extra = np.frombuffer(file.read(4), "<u2")
            header = 30 + int(name) + int(extra)
            grids.setdefault(key, {})[extension[: -len(".pth")]] = member.offset_data + entry.header_offset + header
    return list(grids.values())


def draw_ranges(
    layout: Layout, shards: Sequence[str], rng: np.random.Generator
) -> list[tuple[str, list[tuple[int, int]]]]:
    """One draw of every grid in a random order: (shard, the (offset, bytes) of a random patch and date a sensor)."""
    draws = []
    for shard in shards:
        for offsets in data_offsets(shard):
            ranges = []
            for sensor, offset in offsets.items():
                images = int(np.prod(layout.shape(sensor)[: len(LEADING_AXES[sensor])]))
                used = layout.used_bytes(sensor)
                ranges.append((offset + int(rng.integers(images)) * used, used))
            draws.append((shard, ranges))
    return [draws[i] for i in rng.permutation(len(draws))]
