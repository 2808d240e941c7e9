"""What a benchmark task is: one declarative spec. ``tasks.py`` holds the tasks, ``reader.py`` reads their files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from copernicus.datasets.bench.splits import Entry
from copernicus.datasets.sensors import InputError, Sensor

if TYPE_CHECKING:
    from copernicus.datasets.bench.reader import TaskDataset

Kind = Literal["classification", "multilabel", "segmentation", "changedetection", "regression"]
Preset = Literal["default", "published"]
PRESETS: tuple[Preset, ...] = ("default", "published")
DENSE_KINDS = ("segmentation", "changedetection", "regression")
SENSOR_GROUPS = ("s1", "s2", "s3", "s5p")


@dataclass(frozen=True)
class TrainingDefaults:
    """The benchmark's own settings for training a head on a frozen encoder, or a network from scratch."""

    lr: float
    batch_size: int
    epochs: int = 50
    warmup_epochs: int = 0


@dataclass(frozen=True)
class Task:
    """One benchmark task: what it asks, how it lies on disk, how it is fed to a model, what has been published.

    Path templates are relative to the task's root and filled from an ``Entry``'s fields; a ``*`` must match one file,
    in a series one or more.
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
    images: tuple[tuple[str, ...], ...]  # for each date (or the only one) the files whose bands make the image
    metric: Literal["OA", "mAP", "mIoU", "RMSE"]
    probe: TrainingDefaults
    supervised: TrainingDefaults
    published: Mapping[str, tuple[float, float] | None] = field(hash=False)  # encoder -> mean, deviation of the metric
    listing: Callable[[str], list[Entry]] | None = None  # of the split file; None: a table of HDF5, each row a sample
    static_file: str = ""  # a second list, which names the image of each place
    modes: tuple[str, ...] = ()  # how its samples can be made up, the default first; the others are variants of it
    series: bool = False  # a sample has all dates of its place, one image each
    file_bands: tuple[str, ...] = ()  # order of the bands in the files; empty: the sensor's
    published_sensors: tuple[Sensor, ...] = ()  # what the published code normalises each date by, where that differs
    published_area_km2: float | None = None  # what the published code takes for a token's area, where that differs
    classes: tuple[str, ...] = ()
    label_file: str = ""  # of HDF5: the name of the array
    label_codes: Mapping[int, int] | None = field(default=None, hash=False)  # stored code -> class id or ignore_index
    published_codes: Mapping[int, int] | None = field(default=None, hash=False)  # the published code's, if different
    same_grid: bool = True  # the label has a pixel for each of the image; False: a grid of its own over the same extent
    published_resize: Literal["bilinear", "bicubic"] = "bilinear"  # of images; bicubic: before normalisation
    published_label: Literal["mask", "nearest", "bicubic"] = "mask"  # how labels are resized, see ``resize.py``
    ignore_index: int | None = None
    target_mean: float = 0.0
    target_std: float = 1.0
    date_regex: str = ""  # on the first file name of each date; a group "date" or "start"
    georeferenced: bool = True  # False: what the files say of the place means nothing
    foreign: str = ""  # part of a name by which the samples of another task in the same layout are known
    clamp: tuple[float, float] | None = None  # of raw values
    fill: float | None = None  # raw value that stands for a missing one; None: the mean, after normalisation
    notes: str = ""

    @property
    def num_classes(self) -> int:
        """Outputs of a head: the classes, or one for a regression."""
        return len(self.classes) or 1

    @property
    def dates(self) -> int:
        """Images per sample: 1, or 2 (before, after) for change detection. A series has as many as it has."""
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

    @property
    def sensor_group(self) -> str:
        """The satellite: s1, s2, s3 or s5p."""
        return self.sensor.name.split("_")[0]

    def sensors(self, preset: Preset = "default") -> tuple[Sensor, ...]:
        """The sensor by whose statistics each date is normalised."""
        if preset == "published" and self.published_sensors:
            return self.published_sensors
        return (self.sensor,) * self.dates

    def layout(self) -> str:
        """The expected files, for messages."""
        split_file = f"{self.directory}/{self.split_file.format('<split>')}"
        if self.listing is None:
            size, bands = self.stored_size, self.sensor.channels
            return (
                f"{split_file} with {self.images[0][0]} (N, {size}, {size}, {bands}) and {self.label_file} "
                f"(N, {self.num_classes})"
            )
        others = [self.static_file.format("<split>"), *(name for date in self.images for name in date), self.label_file]
        return ", ".join(dict.fromkeys([split_file, *(f"{self.directory}/{name}" for name in others if name)]))

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
