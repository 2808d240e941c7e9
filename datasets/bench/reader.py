"""Reading a task's samples from the published files.

Shapes: C channels (of all dates, in order of time), H W pixels fed to the model, h w pixels stored, M metadata fields.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
import torch.nn.functional as F
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.warp import transform as transform_coordinates

from copernicus.datasets.bench.task import PRESETS, Entry, Preset, Task
from copernicus.datasets.sensors import InputError, Sensor

# Each sample is a few small files: without this GDAL lists the folder of each one it opens.
GDAL_OPTIONS = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}
UNKNOWN_TARGET = 1e10  # larger magnitudes stand for a missing value in regression targets
WGS84 = CRS.from_epsg(4326)
EPOCH = datetime.date(1970, 1, 1)


@dataclass(frozen=True)
class Raster:
    """One or more GeoTIFFs of the same extent."""

    values_Chw: np.ndarray
    descriptions: tuple[str | None, ...]
    centre: tuple[float, float]  # lon, lat in degrees; NaN: no georeference
    pixel_centre: tuple[float, float]  # of pixel (h // 2, w // 2), likewise


@dataclass(frozen=True)
class Record:
    """One sample and its files."""

    entry: Entry
    images: tuple[tuple[Path, ...], ...]
    label: Path | None


class TaskDataset(Sequence):
    """The samples of one split; ``dataset[i]`` is a dictionary of

    - ``image``: float32 tensor (C, H, W), scaled, normalised and resized: what the model is fed;
    - ``target``: int64 scalar (classification), int64 (H, W) of class ids (segmentation, change detection), or float32
      (H, W) normalised by the task's ``target_mean`` and ``target_std``, NaN where unknown (regression);
    - ``metadata``: float32 (4,): lon, lat, days since 1970-01-01, token area in km^2, NaN where unknown; (2, 4) for
      change detection, a row for each date;
    - ``id``: the sample's name.

    Reading raises InputError for a file that cannot be read, has another number of bands or an unknown label code.
    """

    def __init__(
        self, task: Task, folder: str | Path, split: str, preset: Preset = "default", image_size: int | None = None
    ) -> None:
        if split not in task.splits:
            raise InputError(f"{task.name}: no split {split!r}; the splits are {', '.join(task.splits)}")
        if preset not in PRESETS:
            raise InputError(f"{task.name}: no preset {preset!r}; the presets are {', '.join(PRESETS)}")
        size = task.input_size if image_size is None else image_size
        if size < 1 or size % task.sensor.patch_kernel:
            raise InputError(
                f"{task.name}: image_size {size} must be a positive multiple of the patch kernel, "
                f"{task.sensor.patch_kernel}"
            )
        self.task, self.split, self.preset, self.size = task, split, preset, size
        self.root = task.find_root(folder, split)
        self.split_path = self.root / task.split_file.format(split)
        self._records = _find_files(task, self.root, self.split_path)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        record = self._records[index]
        images, metadata = [], []
        with rasterio.Env(**GDAL_OPTIONS):
            for paths, sensor in zip(record.images, self.task.sensors(self.preset), strict=True):
                raster = read_raster(paths)
                images.append(self._image(raster, sensor, paths))
                metadata.append(self._metadata(raster, paths[0]))
            target = self._target(record)
        return {
            "image": torch.cat(images),
            "target": target,
            "metadata": torch.tensor(metadata if len(metadata) > 1 else metadata[0], dtype=torch.float32),
            "id": record.entry.id,
        }

    @property
    def ids(self) -> list[str]:
        return [record.entry.id for record in self._records]

    def fingerprint(self) -> str:
        """A digest of the names, sizes and times of all files: it changes when the data does."""
        digest = hashlib.sha256()
        for path in [self.split_path, *(path for record in self._records for path in _files(record))]:
            status = path.stat()
            digest.update(f"{path.relative_to(self.root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _image(self, raster: Raster, sensor: Sensor, paths: tuple[Path, ...]) -> torch.Tensor:
        x_Chw = torch.from_numpy(raster.values_Chw[self._band_order(raster, sensor, paths)])
        if self.task.clamp is not None:
            x_Chw = x_Chw.clamp(*self.task.clamp)
        if self.task.fill is not None:
            x_Chw = torch.nan_to_num(x_Chw, self.task.fill)
        return resize_image(sensor.normalize(x_Chw), self.size, self.task.resize, self.preset)

    def _band_order(self, raster: Raster, sensor: Sensor, paths: tuple[Path, ...]) -> list[int]:
        names = raster.descriptions
        if not set(sensor.bands) <= set(names):  # the files do not name their bands: their published order
            names = self.task.file_bands or sensor.bands
            if len(names) != len(raster.values_Chw):
                raise InputError(
                    f"{self.task.name}: {', '.join(map(str, paths))}: {len(raster.values_Chw)} bands, "
                    f"expected {len(names)} ({', '.join(names)})"
                )
        return [names.index(band) for band in sensor.bands]

    def _metadata(self, raster: Raster, path: Path) -> list[float]:
        published = self.preset == "published"
        lon, lat = raster.pixel_centre if published else raster.centre
        _, height, width = raster.values_Chw.shape
        shrink = 1.0 if published else height * width / self.size**2
        days = find_date(path, self.task.date_regex) if self.task.date_regex else float("nan")
        return [lon, lat, days, self.task.sensor.token_area_km2 * shrink]

    def _target(self, record: Record) -> torch.Tensor:
        task = self.task
        if record.label is None:
            return torch.tensor(task.classes.index(record.entry.label))
        raster = read_raster((record.label,))
        if len(raster.values_Chw) != 1:
            raise InputError(f"{task.name}: {record.label}: {len(raster.values_Chw)} bands, a label has 1")
        label_HW = resize_label(raster.values_Chw[0], self.size, self.preset)
        if task.kind == "regression":
            target_HW = np.where(np.abs(label_HW) <= UNKNOWN_TARGET, label_HW, np.nan)
            return torch.from_numpy(((target_HW - task.target_mean) / task.target_std).astype(np.float32))
        assert task.label_codes is not None, task.name
        codes, inverse = np.unique(label_HW, return_inverse=True)
        unknown = [float(code) for code in codes if code not in task.label_codes]
        if unknown:
            raise InputError(
                f"{task.name}: {record.label}: unknown label codes {unknown}; expected {sorted(task.label_codes)}"
            )
        ids = np.array([task.label_codes[int(code)] for code in codes], np.int64)
        return torch.from_numpy(ids[inverse].reshape(label_HW.shape))


def read_raster(paths: Sequence[Path]) -> Raster:
    """The bands of GeoTIFFs of the same extent, one after the other, as float32, with the location of the first.

    Raises:
        InputError: a file cannot be read, or the files differ in size; named.
    """
    values, descriptions = [], []
    centre = pixel_centre = (float("nan"), float("nan"))
    for path in paths:
        try:
            with rasterio.open(path) as source:
                values.append(source.read().astype(np.float32))
                descriptions.extend(source.descriptions)
                if path == paths[0]:
                    centre = _location(source, source.width / 2, source.height / 2)
                    pixel_centre = _location(source, source.width // 2 + 0.5, source.height // 2 + 0.5)
        except RasterioError as error:
            raise InputError(f"{path}: cannot be read as GeoTIFF ({error})") from error
        if values[-1].shape[1:] != values[0].shape[1:]:
            raise InputError(f"{path}: {values[-1].shape[1:]} pixels, but {paths[0]} has {values[0].shape[1:]}")
    return Raster(np.concatenate(values), tuple(descriptions), centre, pixel_centre)


def _location(source: rasterio.DatasetReader, column: float, row: float) -> tuple[float, float]:
    """Longitude and latitude of a point given in pixels from the upper left corner; NaN without a georeference."""
    if source.crs is None or source.transform.is_identity:
        return float("nan"), float("nan")
    a = source.transform
    x, y = a.a * column + a.b * row + a.c, a.d * column + a.e * row + a.f
    if source.crs == WGS84:
        return x, y
    lon, lat = transform_coordinates(source.crs, WGS84, [x], [y])
    return lon[0], lat[0]


def find_date(path: Path, pattern: str) -> float:
    """Days since 1970-01-01 from a file name; NaN where the pattern does not occur.

    Raises:
        InputError: the pattern occurs, with something that is no date.
    """
    match = re.search(pattern, path.name)
    if match is None:
        return float("nan")
    text = next(value for value in match.groupdict().values() if value).replace("-", "")
    try:
        day = datetime.date(int(text[:4]), int(text[4:6]), int(text[6:8]))
    except ValueError as error:
        raise InputError(f"{path}: {text!r} in the name is no date ({error})") from error
    return float((day - EPOCH).days)


def resize_image(x_Chw: torch.Tensor, size: int, mode: str, preset: Preset) -> torch.Tensor:
    """(C, h, w) -> (C, size, size); see the table in ``tasks.py`` for what the presets do."""
    if x_Chw.shape[-2:] == (size, size):
        return x_Chw
    if preset == "default":
        options: dict[str, Any] = {"antialias": True, "align_corners": False}
    else:
        options = {"align_corners": mode == "bilinear"}
    return F.interpolate(x_Chw[None], size=(size, size), mode=mode, **options)[0]


def resize_label(label_hw: np.ndarray, size: int, preset: Preset) -> np.ndarray:
    """(h, w) -> (size, size) nearest to a pixel's centre (default) or upper left corner (published)."""
    offset = 0.5 if preset == "default" else 0.0
    rows, columns = (
        np.minimum(((np.arange(size) + offset) * stored / size).astype(int), stored - 1) for stored in label_hw.shape
    )
    return label_hw[rows[:, None], columns[None, :]]


def _find_files(task: Task, root: Path, split_path: Path) -> list[Record]:
    """The split's samples with all their files, each checked to exist."""
    try:
        entries = task.listing(split_path.read_text())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{task.name}: {split_path} is not as expected ({error!r})") from error
    if not entries:
        raise InputError(f"{task.name}: {split_path} lists no samples")
    unknown = sorted({entry.label for entry in entries if entry.label} - set(task.classes))
    if unknown:
        raise InputError(
            f"{task.name}: {split_path} names unknown classes {unknown}; expected {', '.join(task.classes)}"
        )

    names_in = lru_cache(maxsize=1024)(_names_in)
    missing: list[str] = []

    def find(template: str, entry: Entry) -> Path:
        path = root / template.format_map(entry.fields)
        matches = [name for name in names_in(path.parent) if fnmatch(name, path.name)] if "*" in path.name else None
        if matches is None:
            if path.name not in names_in(path.parent):
                missing.append(f"{path} is missing")
            return path
        if len(matches) != 1:
            missing.append(f"{path} matches {len(matches)} files, expected 1")
            return path
        return path.with_name(matches[0])

    records = [
        Record(
            entry,
            tuple(tuple(find(template, entry) for template in date) for date in task.images),
            find(task.label_file, entry) if task.label_file else None,
        )
        for entry in entries
    ]
    if missing:
        raise InputError(
            f"{task.name}: {missing[0]}{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}, listed in "
            f"{split_path.name}; expected {task.layout()}"
        )
    return records


def _names_in(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:  # no such folder: what is looked for in it is reported as missing
        return frozenset()


def _files(record: Record) -> list[Path]:
    return [path for date in record.images for path in date] + ([record.label] if record.label else [])
