"""Encode a task once with a frozen encoder, and keep the features: hundreds of probe trials then cost what one used to.

The benchmark augments probes' training images by a horizontal and a vertical flip, each with probability 0.5 (its dense
tasks also rotate some, which a frozen encoder cannot serve from a cache; ours do not). So the four flipped copies of a
training image are all there is to encode, and a probe draws among them; validation and test images are encoded once.

Kept on disk under a content address: a digest of the encoder (its weights, and what it answers to a fixed image, which
also tells heads, pooling and language embeddings apart), of the task's files and of the settings. Arrays are
memory-mapped: all trials on a machine share one copy of them. Pooled features are float32, dense ones float16.

Shapes: F flips, N samples, D feature width, h w token grid, H W label size, C channels, M metadata fields.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from copernicus.datasets.bench.reader import TaskDataset
from copernicus.datasets.bench.task import Preset, Task
from copernicus.datasets.order import generator
from copernicus.datasets.sensors import Sensor
from copernicus.models.encoder import Encoder

VERSION = 1  # raise when the meaning of what is stored changes: older entries are then no longer found
SPLITS = ("train", "val", "test")
FLIPS: tuple[tuple[int, ...], ...] = ((), (-1,), (-2,), (-2, -1))
"""The flipped axes of each copy: none, horizontal, vertical, both."""

Progress = Callable[[str, int, int], None]  # split, samples done, samples in all


@dataclass(frozen=True)
class SplitFeatures:
    """One split: ``levels`` holds (F, N, D) once, or (F, N, D, h, w) per level of a dense task.

    Targets are those of the unflipped images: (N,) or (N, K) int64, (N, H, W) int16 class ids or float32.
    """

    levels: tuple[np.ndarray, ...]
    targets: np.ndarray
    ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def flips(self) -> int:
        return self.levels[0].shape[0]

    def load(
        self, index: np.ndarray, flips: np.ndarray, device: str | torch.device = "cpu"
    ) -> tuple[list[Tensor], Tensor]:
        """Some samples, each in the flip of that number: float32 levels, and targets flipped alike.

        Returns:
            [(B, D)], or (B, D, h, w) per level; and the targets, (B,) or (B, K) int64, (B, H, W) int64 or float32.
        """
        levels = [torch.from_numpy(level[flips, index]).to(device).float() for level in self.levels]
        target = torch.from_numpy(self.targets[index])
        if target.ndim == 3 and flips.any():
            target = torch.stack([one.flip(FLIPS[flip]) for one, flip in zip(target, flips, strict=True)])
        target = target if target.is_floating_point() else target.long()
        return levels, target.to(device)


@dataclass(frozen=True)
class TaskFeatures:
    """All splits of a task, encoded; ``folders`` says where each is kept, ``cached`` whether all were found there.

    Sent to another process, those of a cache are opened there again: what travels is where they lie.
    """

    task: str
    splits: dict[str, SplitFeatures]
    folders: Mapping[str, Path] = field(default_factory=dict)
    cached: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        if self.folders:
            return _open, (self.task, self.folders, self.cached)
        return type(self), (self.task, self.splits)

    @property
    def dims(self) -> tuple[int, ...]:
        """Feature width of each level."""
        return tuple(level.shape[2] for level in self.splits["train"].levels)


def encode_task(
    encoder: Encoder,
    task: Task,
    folder: str | Path,
    cache: str | Path,
    *,
    preset: Preset = "default",
    image_size: int | None = None,
    flips: bool = True,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> TaskFeatures:
    """The features of a task's three splits, from the cache where they are there, else encoded and stored.

    Args:
        encoder: frozen; it is used in evaluation mode where it lies (move it to its device first).
        folder: the task's root or its parent.
        cache: folder that holds the features of any number of tasks and encoders; several processes may share it.
        flips: encode the four flipped copies of training images.
        progress: called after each batch.

    Raises:
        InputError: something is wrong with the task's files.
        ValueError: the encoder gives features that are not finite.
    """
    identity = encoder_identity(encoder, task.sensor, task.sensor.patch_kernel * 4)
    folders, cached = {}, True
    for split in SPLITS:
        dataset = task.open(folder, split, preset, image_size)
        used = FLIPS if flips and split == "train" else FLIPS[:1]
        entry = Path(cache) / task.name / _address(identity, dataset, len(used))
        if not entry.is_dir():
            cached = False
            _store(entry, encoder, dataset, used, batch_size, progress)
        folders[split] = entry.absolute()
    return _open(task.name, folders, cached)


def _open(task: str, folders: Mapping[str, Path], cached: bool) -> TaskFeatures:
    return TaskFeatures(task, {split: load_features(entry) for split, entry in folders.items()}, folders, cached)


def load_features(entry: str | Path) -> SplitFeatures:
    """Memory-map one stored split."""
    entry = Path(entry)
    content = json.loads((entry / "content.json").read_text())
    levels = tuple(np.load(entry / f"level{i}.npy", mmap_mode="r") for i in range(content["levels"]))
    return SplitFeatures(levels, np.load(entry / "targets.npy"), tuple(content["ids"]))


def encoder_identity(encoder: Encoder, sensor: Sensor, size: int) -> str:
    """A digest of an encoder: its weights, and its answer to a fixed image.

    The answer tells apart encoders of equal weights that compute something else (number of heads, pooling, language
    embeddings, code). It is rounded coarsely, so that another number of threads gives the same digest.
    """
    digest = hashlib.sha256()
    for name, value in sorted(encoder.state_dict().items()):
        array = value.detach().cpu().contiguous()
        digest.update(f"{name}\0{array.dtype}\0{tuple(array.shape)}\0".encode())
        digest.update(array.flatten().view(torch.uint8).numpy().tobytes())
    rng = generator("encoder identity")
    image = torch.from_numpy(rng.standard_normal((1, sensor.channels, size, size), np.float32))
    metadata = torch.tensor([[7.0, 47.0, 18262.0, sensor.token_area_km2]])
    with _frozen(encoder):
        answers = [
            encoder.encode(image, sensor, metadata, normalize=False),
            *(level.mean((-2, -1)) for level in encoder.encode_dense(image, sensor, metadata, normalize=False)),
        ]
    for answer in answers:
        values = answer.flatten()[:16].cpu().double()
        rounded = torch.round(values / values.abs().max().clamp(min=1e-30) * 64).to(torch.int8)
        digest.update(rounded.numpy().tobytes())
    return digest.hexdigest()


def encode_images(
    encoder: Encoder, task: Task, x_BCHW: Tensor, metadata: Tensor, sensors: tuple[Sensor, ...]
) -> list[Tensor]:
    """Features of a batch as the task wants them: [(B, D)], or (B, D, h, w) per level for a dense task.

    Change detection encodes each date on its own and subtracts, after - before.

    Args:
        x_BCHW: normalised images, the channels of all dates in order of time.
        metadata: (B, M), or (B, dates, M).
        sensors: the sensor of each date.
    """
    if not task.dense:
        return [encoder.encode(x_BCHW, sensors[0], metadata, normalize=False)]
    if task.dates == 1:
        return encoder.encode_dense(x_BCHW, sensors[0], metadata, normalize=False)
    before, after = (
        encoder.encode_dense(x, sensor, metadata[:, date], normalize=False)
        for date, (x, sensor) in enumerate(zip(x_BCHW.chunk(task.dates, dim=1), sensors, strict=True))
    )
    return [b - a for a, b in zip(before, after, strict=True)]


@contextmanager
def _frozen(encoder: Encoder) -> Iterator[None]:
    """Evaluation mode without gradients; the mode from before returns afterwards."""
    training = encoder.training
    encoder.train(False)
    try:
        with torch.inference_mode():
            yield
    finally:
        encoder.train(training)


def _address(identity: str, dataset: TaskDataset, flips: int) -> str:
    spec = {f.name: getattr(dataset.task, f.name) for f in dataclasses.fields(dataset.task) if f.name != "listing"}
    key = [VERSION, identity, dataset.fingerprint(), dataset.split, dataset.preset, dataset.size, flips, repr(spec)]
    return f"{dataset.split}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}"


def _store(
    entry: Path,
    encoder: Encoder,
    dataset: TaskDataset,
    flips: tuple[tuple[int, ...], ...],
    batch_size: int,
    progress: Progress | None,
) -> None:
    """Encode into a folder beside the entry, then rename: an entry is there whole or not at all."""
    partial = entry.with_name(f".{entry.name}-{uuid.uuid4().hex}")
    partial.mkdir(parents=True)
    try:
        _encode(partial, encoder, dataset, flips, batch_size, progress)
        try:
            os.rename(partial, entry)
        except OSError:  # another process has stored the same meanwhile
            if not entry.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _encode(
    folder: Path,
    encoder: Encoder,
    dataset: TaskDataset,
    flips: tuple[tuple[int, ...], ...],
    batch_size: int,
    progress: Progress | None,
) -> None:
    task, samples = dataset.task, len(dataset)
    sensors = task.sensors(dataset.preset)
    dtype = np.dtype(np.float16 if task.dense else np.float32)
    levels: list[np.memmap] = []
    targets = []
    for start in range(0, samples, batch_size):
        batch = [dataset[i] for i in range(start, min(start + batch_size, samples))]
        x_BCHW = torch.stack([sample["image"] for sample in batch])
        metadata = torch.stack([sample["metadata"] for sample in batch])
        targets.append(torch.stack([sample["target"] for sample in batch]).numpy())
        for flip, axes in enumerate(flips):
            with _frozen(encoder):
                answers = encode_images(encoder, task, x_BCHW.flip(axes), metadata, sensors)
            for number, answer in enumerate(answers):
                values = answer.float().cpu().numpy().astype(dtype)
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"{task.name}: the encoder's features (level {number}) are not finite as {dtype} for one of "
                        f"{batch[0]['id']} .. {batch[-1]['id']}"
                    )
                if len(levels) <= number:
                    path, shape = folder / f"level{number}.npy", (len(flips), samples, *values.shape[1:])
                    levels.append(np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape))
                levels[number][flip, start : start + len(batch)] = values
        if progress is not None:
            progress(dataset.split, start + len(batch), samples)
    for level in levels:
        level.flush()
    stored = np.concatenate(targets)
    if task.dense and task.kind != "regression":
        stored = stored.astype(np.int16)
    np.save(folder / "targets.npy", stored)
    (folder / "content.json").write_text(json.dumps({"levels": len(levels), "ids": dataset.ids}))
