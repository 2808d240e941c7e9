"""A task's samples as they are fed to a model: read from the published files, normalised, resized, described.

Shapes: C channels (of all dates, in order of time), T dates of a series, H W pixels fed to the model, h w pixels stored,
K classes, M metadata fields.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from copernicus.datasets.bench.geotiffs import GeoTiffSamples, Stored
from copernicus.datasets.bench.raster import NOWHERE, Raster
from copernicus.datasets.bench.resize import (
    published_bilinear,
    published_cubic,
    published_mask,
    published_nearest,
    resize_image,
    resize_label,
)
from copernicus.datasets.bench.tables import TableSamples
from copernicus.datasets.bench.task import PRESETS, Preset, Task
from copernicus.datasets.sensors import InputError, Sensor

UNKNOWN_TARGET = 1e10  # larger magnitudes stand for a missing value in regression targets
PUBLISHED_LABELS = {"mask": published_mask, "nearest": published_nearest}


class TaskDataset(Sequence):
    """The samples of one split; ``dataset[i]`` is a dictionary of

    - ``image``: float32 tensor (C, H, W), scaled, normalised and resized: what the model is fed; (T, C, H, W) for a
      series, T as many dates as the sample has;
    - ``target``: int64 scalar (classification), int64 (K,) of 0 and 1 (multilabel), int64 (H, W) of class ids
      (segmentation, change detection), or float32 (H, W) normalised by the task's ``target_mean`` and ``target_std``,
      NaN where unknown (regression);
    - ``metadata``: float32 (4,): lon, lat, days since 1970-01-01, token area in km^2, NaN where unknown; (2, 4) for
      change detection and (T, 4) for a series, a row for each date;
    - ``id``: the sample's name.

    Reading raises InputError for a file that cannot be read, has another number of bands, a label that does not fit the
    image, or an unknown label code.
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
        samples = GeoTiffSamples if task.listing else TableSamples
        self._samples: GeoTiffSamples | TableSamples = samples(task, self.root, split)

    def __len__(self) -> int:
        return len(self._samples.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]
        name = self._samples.ids[index]
        stored = self.stored(index)
        sensors = self.task.sensors(self.preset)
        if self.task.series:
            sensors *= len(stored.dates)
        image = self._image if self.preset == "default" else self._published_image
        images = [
            image(self._ordered(raster, sensor, path), sensor)
            for raster, sensor, path in zip(stored.dates, sensors, stored.names, strict=True)
        ]
        target = self._target(stored) if self.preset == "default" else self._published_target(stored)
        metadata = torch.tensor(self._metadata(stored.dates), dtype=torch.float32)
        return {
            "image": torch.stack(images) if self.task.series else torch.cat(images),
            "target": target,
            "metadata": metadata if self.task.series or len(metadata) > 1 else metadata[0],
            "id": name,
        }

    def stored(self, index: int) -> Stored:
        """A sample as its files have it, before anything is made of it."""
        return self._samples.read(index)

    @property
    def ids(self) -> list[str]:
        return self._samples.ids

    def fingerprint(self) -> str:
        """A digest of the names, sizes and times of all files: it changes when the data does."""
        digest = hashlib.sha256()
        for path in self._samples.files():
            status = path.stat()
            digest.update(f"{path.relative_to(self.root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return digest.hexdigest()

    def _ordered(self, raster: Raster, sensor: Sensor, path: str) -> np.ndarray:
        """The bands in the sensor's order, as float32, missing values filled."""
        names: tuple[str | None, ...] = raster.descriptions
        if self.preset == "published" or not set(sensor.bands) <= set(names):
            names = self.task.file_bands or sensor.bands  # the files do not name their bands: their published order
            if len(names) != len(raster.values_Chw):
                raise InputError(
                    f"{self.task.name}: {path}: {len(raster.values_Chw)} bands, expected {len(names)} "
                    f"({', '.join(map(str, names))})"
                )
        x_Chw = raster.values_Chw[[names.index(band) for band in sensor.bands]].astype(np.float32)
        if self.task.clamp is not None:
            x_Chw = x_Chw.clip(*self.task.clamp)
        if self.task.fill is not None:
            x_Chw[np.isnan(x_Chw)] = self.task.fill
        return x_Chw

    def _image(self, x_Chw: np.ndarray, sensor: Sensor) -> torch.Tensor:
        mode = self.task.published_resize
        return resize_image(sensor.normalize(torch.from_numpy(x_Chw)), self.size, mode)

    def _published_image(self, x_Chw: np.ndarray, sensor: Sensor) -> torch.Tensor:
        scale, mean, std = (
            np.array(values, np.float32)[:, None, None] for values in (sensor.scale, sensor.mean, sensor.std)
        )
        if self.task.published_resize == "bicubic":
            return torch.from_numpy((published_cubic(x_Chw * scale, self.size) - mean) / std)
        return published_bilinear(torch.from_numpy((x_Chw * scale - mean) / std), self.size)

    def _metadata(self, dates: Sequence[Raster]) -> list[list[float]]:
        task, published = self.task, self.preset == "published"
        rows = []
        for raster in dates:
            # The published code takes the place of a change from its last image alone.
            placed = dates[-1] if published and not task.series else raster
            lon, lat = placed.pixel_centre if published else placed.centre
            if not task.georeferenced:
                lon, lat = NOWHERE
            _, height, width = raster.values_Chw.shape
            area = task.sensor.token_area_km2 * height * width / self.size**2
            if published:
                area = task.published_area_km2 or task.sensor.token_area_km2
            rows.append([lon, lat, raster.days, area])
        return rows

    def _target(self, stored: Stored) -> torch.Tensor:
        if isinstance(stored.target, tuple):
            if self.task.kind == "classification" and sum(stored.target) != 1:
                raise InputError(f"{self.task.name}: {stored.target_name}: the label names no single class")
            return self._labels(stored.target)
        label_HW = resize_label(self._checked(stored), self.size)
        if self.task.kind == "regression":
            return self._normalised(_known(label_HW))
        return self._ids(label_HW, self.task.label_codes, stored)

    def _published_target(self, stored: Stored) -> torch.Tensor:
        if isinstance(stored.target, tuple):
            return self._labels(stored.target)
        label_hw = self._checked(stored)
        if self.task.published_label == "bicubic":  # unknown values are not looked for, and spread
            return self._normalised(published_cubic(label_hw[None], self.size)[0])
        label_HW = PUBLISHED_LABELS[self.task.published_label](label_hw, self.size)
        if self.task.kind == "regression":
            return self._normalised(_known(label_HW))
        return self._ids(label_HW, self.task.published_codes or self.task.label_codes, stored)

    def _labels(self, labels: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(labels if self.task.kind == "multilabel" else int(np.argmax(labels)))

    def _checked(self, stored: Stored) -> np.ndarray:
        """The label map; InputError where it does not fit the image."""
        label_hw, task = np.asarray(stored.target), self.task
        for raster, name in zip(stored.dates, stored.names, strict=True):
            image = raster.values_Chw.shape[1:]
            ratio = [label / pixels for label, pixels in zip(label_hw.shape, image, strict=True)]
            # Grids of two sources that cover the same extent have sides that are in proportion but for a pixel or two.
            if label_hw.shape != image if task.same_grid else not 0.9 < ratio[0] / ratio[1] < 1.1:
                raise InputError(
                    f"{task.name}: {stored.target_name}: {label_hw.shape[0]} x {label_hw.shape[1]} pixels do not fit "
                    f"the {image[0]} x {image[1]} of {name}"
                )
        return label_hw

    def _normalised(self, target_HW: np.ndarray) -> torch.Tensor:
        mean, std = np.float32(self.task.target_mean), np.float32(self.task.target_std)
        return torch.from_numpy((target_HW.astype(np.float32) - mean) / std)

    def _ids(self, label_HW: np.ndarray, ids_of: Any, stored: Stored) -> torch.Tensor:
        codes, inverse = np.unique(label_HW, return_inverse=True)
        unknown = [float(code) for code in codes if code not in ids_of]
        if unknown:
            raise InputError(
                f"{self.task.name}: {stored.target_name}: unknown label codes {unknown}; expected {sorted(ids_of)}"
            )
        ids = np.array([ids_of[int(code)] for code in codes], np.int64)
        return torch.from_numpy(ids[inverse].reshape(label_HW.shape))


def _known(target_HW: np.ndarray) -> np.ndarray:
    return np.where(np.abs(target_HW) <= UNKNOWN_TARGET, target_HW, np.nan)
