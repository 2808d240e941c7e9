"""What a benchmark task is: one declarative spec. ``tasks.py`` holds the tasks, ``reader.py`` reads their files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from copernicus.datasets.sensors import InputError, Sensor

if TYPE_CHECKING:
    from copernicus.datasets.bench.reader import TaskDataset

Kind = Literal["classification", "multilabel", "segmentation", "changedetection", "regression"]
Preset = Literal["default", "published"]
PRESETS: tuple[Preset, ...] = ("default", "published")
DENSE_KINDS = ("segmentation", "changedetection", "regression")


@dataclass(frozen=True)
class Entry:
    """One sample as its split file lists it."""

    id: str
    fields: Mapping[str, str]  # what the task's path templates ask for
    label: str = ""  # class name, where the split file tells it


def list_lines(text: str) -> list[Entry]:
    """A split file with one sample name a line, used in the paths as ``{name}``."""
    names = [line.strip() for line in text.splitlines()]
    return [Entry(name, {"name": name}) for name in names if name]


def list_class_files(text: str) -> list[Entry]:
    """A split file with one ``Class_number.jpg`` a line, used as ``{class_name}`` and ``{stem}``."""
    entries = []
    for line in filter(None, (line.strip() for line in text.splitlines())):
        stem = line.removesuffix(".jpg").removesuffix(".tif")
        class_name = stem.split("_")[0]
        entries.append(Entry(stem, {"class_name": class_name, "stem": stem}, label=class_name))
    return entries


def list_grid_dict(text: str) -> list[Entry]:
    """A JSON dictionary id -> {"path": folder, ...}, in the file's order, used as ``{path}``."""
    return [Entry(key, {"path": str(value["path"]).strip("/")}) for key, value in json.loads(text).items()]


@dataclass(frozen=True)
class ProbeDefaults:
    """The benchmark's own settings for a probe on a frozen encoder."""

    lr: float
    batch_size: int
    epochs: int = 50
    warmup_epochs: int = 0


@dataclass(frozen=True)
class Task:
    """One benchmark task: what it asks, how it lies on disk, how it is fed to a model, what has been published.

    Path templates are relative to the task's root and filled from an ``Entry``'s fields; a ``*`` must match one file.
    """

    name: str
    title: str
    level: str
    kind: Kind
    sensor: Sensor
    splits: Mapping[str, int] = field(hash=False)  # samples in the published splits
    stored_size: int  # pixels a side, as published
    input_size: int  # pixels a side, as fed to the model
    directory: str
    split_file: str  # "{}" stands for the split
    listing: Callable[[str], list[Entry]]
    images: tuple[tuple[str, ...], ...]  # for each date (or the only one) the files whose bands make the image
    metric: Literal["OA", "mAP", "mIoU", "RMSE"]
    probe: ProbeDefaults
    published: Mapping[str, tuple[float, float] | None] = field(hash=False)  # encoder -> mean, deviation of the metric
    file_bands: tuple[str, ...] = ()  # order of the bands in the files; empty: the sensor's
    published_sensors: tuple[Sensor, ...] = ()  # what the published code normalises each date by, where that differs
    classes: tuple[str, ...] = ()
    label_file: str = ""
    label_codes: Mapping[int, int] | None = field(default=None, hash=False)  # stored code -> class id or ignore_index
    ignore_index: int | None = None
    target_mean: float = 0.0
    target_std: float = 1.0
    date_regex: str = ""  # on the first file name of each date; a group "date" or "start"
    resize: Literal["bilinear", "bicubic"] = "bilinear"
    clamp: tuple[float, float] | None = None  # of raw values
    fill: float | None = None  # raw value that stands for a missing one; None: the mean, after normalisation
    notes: str = ""

    @property
    def num_classes(self) -> int:
        """Outputs of a head: the classes, or one for a regression."""
        return len(self.classes) or 1

    @property
    def dates(self) -> int:
        """Images per sample: 1, or 2 (before, after) for change detection."""
        return len(self.images)

    @property
    def dense(self) -> bool:
        """True: one target per pixel; False: one per image."""
        return self.kind in DENSE_KINDS

    @property
    def higher_is_better(self) -> bool:
        return self.metric != "RMSE"

    @property
    def metric_key(self) -> str:
        """The metric's name in results: oa, map, miou (per cent) or rmse (the target's units)."""
        return self.metric.lower()

    def sensors(self, preset: Preset = "default") -> tuple[Sensor, ...]:
        """The sensor by whose statistics each date is normalised."""
        if preset == "published" and self.published_sensors:
            return self.published_sensors
        return (self.sensor,) * self.dates

    def layout(self) -> str:
        """The expected files, for messages."""
        files = [self.split_file.format("<split>"), *(name for date in self.images for name in date), self.label_file]
        return ", ".join(f"{self.directory}/{name}" for name in files if name)

    def find_root(self, folder: str | Path, split: str) -> Path:
        """The task's root: ``folder`` itself, or a folder named as published below it.

        Raises:
            InputError: the folder or the split file is not there; the message names the expected layout.
        """
        folder = Path(folder)
        parts = Path(self.directory).parts
        below = [Path(*parts[start:]) for start in range(len(parts))]
        name = self.split_file.format(split)
        for root in [*(folder / path for path in below), folder]:
            if (root / name).is_file():
                return root
        if not folder.is_dir():
            raise InputError(f"{self.name}: no folder {folder}; give the folder that holds {self.directory}/")
        raise InputError(
            f"{self.name}: no split file {name} in {folder} or {folder / self.directory}; expected {self.layout()}"
        )

    def open(
        self, folder: str | Path, split: str, preset: Preset = "default", image_size: int | None = None
    ) -> TaskDataset:
        """The samples of a split, in the split file's order.

        Args:
            folder: the task's root (the unpacked archive), or its parent.
            split: train, val or test.
            preset: ``default``, or ``published``: exactly what the published code feeds in evaluation.
            image_size: pixels a side of image and target; None: the published input size.

        Returns:
            a sequence of samples; see ``TaskDataset``.

        Raises:
            InputError: unknown split or preset, or files that are missing or unreadable, named.
        """
        from copernicus.datasets.bench.reader import TaskDataset

        return TaskDataset(self, folder, split, preset, image_size)
