"""The samples of a split that lie in one HDF5 file, a row of its arrays each.

Shapes: N samples, C channels, h w pixels stored, K classes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from copernicus.datasets.bench.geotiffs import Stored
from copernicus.datasets.bench.raster import Raster
from copernicus.datasets.bench.task import Task
from copernicus.datasets.sensors import InputError


class TableSamples:
    """The rows of ``<split_file>``: images (N, h, w, C) in one array, labels (N, K), one-hot, in another.

    The file is opened by each process that reads it: HDF5's handles neither travel nor survive a fork.

    Raises:
        InputError: the file is no HDF5 or truncated, lacks an array, or has one of another shape; named.
    """

    def __init__(self, task: Task, root: Path, split: str) -> None:
        self.task, self.path = task, root / task.split_file.format(split)
        self._opened: tuple[int, Any] | None = None
        (self._images,), self._labels = task.images[0], task.label_file
        with self._open() as file:
            for name in (self._images, self._labels):
                if not isinstance(file.get(name), h5py.Dataset):
                    raise InputError(f"{task.name}: {self.path} has no array {name!r}; expected {task.layout()}")
            images, labels = file[self._images].shape, file[self._labels].shape
        if len(images) != 4 or images[3] != task.sensor.channels:
            raise InputError(
                f"{task.name}: {self.path}: {self._images} has shape {images}, expected (N, height, width, "
                f"{task.sensor.channels}): the bands {', '.join(task.sensor.bands)}"
            )
        if labels != (images[0], task.num_classes):
            raise InputError(
                f"{task.name}: {self.path}: {self._labels} has shape {labels}, expected ({images[0]}, "
                f"{task.num_classes}): one-hot, a row for each image"
            )
        if not images[0]:
            raise InputError(f"{task.name}: {self.path} holds no samples")
        self.ids = [f"{split}_{row:06d}" for row in range(images[0])]

    def files(self) -> list[Path]:
        return [self.path]

    def read(self, index: int) -> Stored:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), self._open()
        file = self._opened[1]
        try:
            image_hwC, label_K = file[self._images][index], file[self._labels][index]
        except (OSError, RuntimeError) as error:
            raise InputError(f"{self.task.name}: {self.path}: row {index} cannot be read ({error})") from error
        name = f"{self.path}, row {index}"
        return Stored((Raster(np.moveaxis(image_hwC, -1, 0)),), (name,), tuple(map(int, label_K)), name)

    def _open(self) -> Any:
        try:
            return h5py.File(self.path, "r")
        except OSError as error:
            raise InputError(
                f"{self.task.name}: {self.path} cannot be read as HDF5 ({error}); expected {self.task.layout()}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None}
