"""Encode a task once with a frozen encoder, and keep the features: hundreds of probe trials then cost what one used to.

What is encoded, and how its numbers are stored, says ``encoding.py``; where they lie, ``feature_store.py``. An entry's
address is a digest of the encoder (its weights, and what it answers to a fixed image, which also tells heads, pooling and
language embeddings apart), of the task's files, of the settings, and of what this code reads from the first sample.
Arrays are memory-mapped: all trials on a machine share one copy of them.

Shapes: F flips, N samples, B batch, D feature width, h w token grid, H W label size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from copernicus.datasets.bench.reader import TaskDataset
from copernicus.datasets.bench.task import Preset, Task
from copernicus.datasets.sensors import InputError
from copernicus.models.encoder import Encoder
from copernicus.platform.encode_splits import Job, Pool, Progress, encode_splits
from copernicus.platform.encoding import (
    FLIPS,
    PRECISIONS,
    Precision,
    device_of,
    encode_images,
    encoder_identity,
    flipped_targets,
    reading_identity,
)
from copernicus.platform.eviction import contents, evict
from copernicus.platform.feature_store import Damaged, Opened, find, open_entry, writing
from copernicus.platform.live_split import LiveSplit

__all__ = ["FLIPS", "LiveSplit", "Split", "SplitFeatures", "TaskFeatures", "encode_images", "encode_task"]

logger = logging.getLogger(__name__)

VERSION = 2  # raise when the meaning of what is stored changes: older entries are then no longer found
SPLITS = ("train", "val", "test")

Keep = Literal["auto", "cached", "live"]
KEEPS: tuple[Keep, ...] = ("auto", "cached", "live")


class Split(Protocol):
    """What training asks of a split's features, kept or not.

    Attributes:
        ids: the samples' names.
        targets: of the unflipped images: (N,) or (N, K) int64, (N, H, W) int16 class ids or float32.
        flips: copies of each sample, the first ones of ``FLIPS``.
        dims: feature width of each level.
    """

    @property
    def ids(self) -> tuple[str, ...]: ...
    @property
    def targets(self) -> np.ndarray: ...
    @property
    def flips(self) -> int: ...
    @property
    def dims(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def load(
        self, index: np.ndarray, flips: np.ndarray, device: str | torch.device = "cpu"
    ) -> tuple[list[Tensor], Tensor]:
        """Some samples, each in the flip of that number: float32 levels, and targets flipped alike.

        Returns:
            [(B, D)], or (B, D, h, w) per level; and the targets, (B,) or (B, K) int64, (B, H, W) int64 or float32.
        """
        ...


@dataclass(frozen=True)
class SplitFeatures:
    """A split that is kept: ``levels`` holds (F, N, D) once, or (F, N, D, h, w) per level of a dense task."""

    levels: tuple[np.ndarray, ...]
    targets: np.ndarray
    ids: tuple[str, ...]
    lease: Any = field(default=None, repr=False, compare=False)  # of the store: no eviction while this lives

    def __len__(self) -> int:
        return len(self.ids)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.levels, self.targets, self.ids)

    @property
    def flips(self) -> int:
        return self.levels[0].shape[0]

    @property
    def dims(self) -> tuple[int, ...]:
        return tuple(level.shape[2] for level in self.levels)

    def load(
        self, index: np.ndarray, flips: np.ndarray, device: str | torch.device = "cpu"
    ) -> tuple[list[Tensor], Tensor]:
        levels = [torch.from_numpy(level[flips, index]).to(device).float() for level in self.levels]
        return levels, flipped_targets(self.targets[index], flips).to(device)


@dataclass(frozen=True)
class TaskFeatures:
    """All splits of a task; ``folders`` says where the cached ones are, ``cached`` whether nothing had to be encoded.

    Sent to another process, those of a cache are opened there again: what travels is where they lie.
    """

    task: str
    splits: Mapping[str, Split]
    folders: Mapping[str, Path] = field(default_factory=dict)
    cached: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        others = {name: split for name, split in self.splits.items() if name not in self.folders}
        return _open, (self.task, self.folders, others, self.cached)

    @property
    def dims(self) -> tuple[int, ...]:
        """Feature width of each level."""
        return self.splits["train"].dims


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
    precision: Precision = "float32",
    keep: Keep = "auto",
    cache_gb: float | None = None,
    workers: int = 0,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    progress: Progress | None = None,
) -> TaskFeatures:
    """The features of a task's three splits, from the cache where they are there, else encoded and stored.

    Args:
        encoder: frozen; it is used in evaluation mode where it lies (move it to its device first).
        folder: the task's root or its parent.
        cache: folder that holds the features of any number of tasks and encoders; several processes may share it.
        flips: encode the four flipped copies of training images.
        precision: ``float32``, or ``bf16``: the encoder under bf16 autocast.
        keep: ``cached``; ``live``: nothing is kept, each load reads and encodes; ``auto``: cached, but for the splits
            that would not fit below ``cache_gb`` (or on the disk), by an estimate from one sample.
        cache_gb: 10^9 bytes that the cache may hold; older entries go when new ones need the room. None: no limit.
        workers: Ray Data actors that encode, each with ``cpus_per_worker`` and ``gpus_per_worker``; on a cluster, data
            and cache must be on a folder that all nodes share. 0: this process encodes, without Ray.
        progress: called after each batch.

    Raises:
        InputError: something is wrong with the task's files, or no node has room for a worker.
        ValueError: the encoder gives features that are not finite.
    """
    if precision not in PRECISIONS or keep not in KEEPS:
        raise InputError(
            f"features: precision {precision!r} must be one of {', '.join(PRECISIONS)}, "
            f"keep {keep!r} one of {', '.join(KEEPS)}"
        )
    cache = Path(cache).absolute()
    copies = {split: len(FLIPS) if flips and split == "train" else 1 for split in SPLITS}
    datasets = {split: task.open(folder, split, preset, image_size) for split in SPLITS}
    live = {split: LiveSplit(encoder, datasets[split], copies[split], precision) for split in SPLITS}
    if keep == "live":
        return TaskFeatures(task.name, live)
    identity = encoder_identity(encoder, task.sensor, task.sensor.patch_kernel * 4)
    entries = {
        split: cache / task.name / _address(identity, dataset, copies[split], precision)
        for split, dataset in datasets.items()
    }
    opened: dict[str, Opened] = {split: o for split, entry in entries.items() if (o := find(entry)) is not None}
    missing = [split for split in SPLITS if split not in opened]
    if missing:
        needed = {split: _feature_bytes(task, live[split]) for split in missing}
        limit = math.inf if cache_gb is None else cache_gb * 1e9
        missing = _fitting(task, needed, opened, cache, limit, keep)
        evict(cache, limit - sum(needed[split] for split in missing))
        places = {split: entries[split] for split in missing}
        jobs = {
            split: Job(
                "", task, str(Path(folder).absolute()), split, preset, image_size, copies[split], d.fingerprint()
            )
            for split, d in datasets.items()
        }
        pool = Pool(workers, cpus_per_worker, gpus_per_worker)
        ids = {split: dataset.ids for split, dataset in datasets.items()}
        opened |= _encode_into(places, jobs, ids, encoder, precision, batch_size, pool, progress)
        evict(cache, limit)
    splits: dict[str, Split] = {s: _features(opened[s]) if s in opened else live[s] for s in SPLITS}
    folders = {split: entry for split, entry in entries.items() if split in opened}
    return TaskFeatures(task.name, splits, folders, not missing and len(folders) == len(SPLITS))


def _encode_into(
    places: Mapping[str, Path],
    jobs: Mapping[str, Job],
    ids: Mapping[str, Sequence[str]],
    encoder: Encoder,
    precision: Precision,
    batch_size: int,
    pool: Pool,
    progress: Progress | None,
) -> dict[str, Opened]:
    """Make the entries that no other process makes meanwhile; each is in its place, and open, once its split is done."""
    opened: dict[str, Opened] = {}
    with contextlib.ExitStack() as stack:
        held: dict[str, contextlib.ExitStack] = {}
        begun: list[Job] = []
        for split, place in places.items():  # always in the same order: two processes never wait for each other
            own = stack.enter_context(contextlib.ExitStack())
            partial = own.enter_context(writing(place))
            if partial is None:
                opened[split] = open_entry(place)
            else:
                held[split] = own
                begun.append(dataclasses.replace(jobs[split], folder=str(partial)))
        names = [ids[job.split] for job in begun]
        for number in encode_splits(encoder, begun, names, precision, batch_size, pool, progress):
            split = begun[number].split
            held[split].close()
            opened[split] = open_entry(places[split])
    return opened


def load_features(entry: str | Path) -> SplitFeatures:
    """Memory-map one stored split.

    Raises:
        InputError: it is not there, or not as it was stored.
    """
    try:
        return _features(open_entry(Path(entry)))
    except (FileNotFoundError, Damaged) as error:
        reason = "they are not there" if isinstance(error, FileNotFoundError) else str(error)
        raise InputError(
            f"cached features {entry}: {reason}; run the same command again to encode them anew (on a cluster, the cache "
            f"must be a folder that all nodes share; if its limit is small beside what runs at once, raise it)"
        ) from error


def _open(task: str, folders: Mapping[str, Path], others: Mapping[str, Split], cached: bool) -> TaskFeatures:
    splits = {**others, **{split: load_features(entry) for split, entry in folders.items()}}
    return TaskFeatures(task, splits, folders, cached)


def _features(opened: Opened) -> SplitFeatures:
    return SplitFeatures(opened.levels, opened.targets, opened.ids, opened.lease)


def _address(identity: str, dataset: TaskDataset, flips: int, precision: Precision) -> str:
    spec = {f.name: getattr(dataset.task, f.name) for f in dataclasses.fields(dataset.task) if f.name != "listing"}
    data = [
        dataset.fingerprint(),
        reading_identity(dataset[0]),
        dataset.split,
        dataset.preset,
        dataset.size,
        repr(spec),
    ]
    key = [VERSION, identity, precision, flips, *data]
    return f"{dataset.split}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}"


def _feature_bytes(task: Task, split: LiveSplit) -> int:
    """What a split's features and targets will take, from its first sample."""
    levels, target = split.load(np.array([0]), np.array([0]), device_of(split.encoder))
    sample = sum(level.numel() for level in levels) * (2 if task.dense else 4)
    label = target.numel() * (8 if not task.dense else 4 if task.kind == "regression" else 2)
    return len(split) * (split.flips * sample + label)


def _fitting(
    task: Task, needed: Mapping[str, int], opened: Mapping[str, Opened], cache: Path, limit: float, keep: Keep
) -> list[str]:
    """The splits to encode, of those that are needed: with ``auto`` as many as there is room for.

    Raises:
        InputError: all are to be kept, and the disk has no room.
    """
    there = next(folder for folder in (cache, *cache.parents) if folder.is_dir())
    # What the limit would have go may be overwritten.
    free = shutil.disk_usage(there).free + (sum(one.bytes for one in contents(cache)) if math.isfinite(limit) else 0)
    held = sum(level.nbytes for one in opened.values() for level in one.levels)
    room = min(limit - held, free) if keep == "auto" else free
    sizes = ", ".join(f"{split} {size / 1e9:.2f}" for split, size in needed.items())
    logger.info("%s: GB of features to encode: %s", task.name, sizes)
    if keep == "cached" and sum(needed.values()) > room:
        raise InputError(
            f"{task.name}: its features take {sum(needed.values()) / 1e9:.1f} GB ({sizes}), and the disk of {cache} has "
            f"room for {room / 1e9:.1f} GB; give another cache, a smaller image size, or keep: auto"
        )
    fitting = []
    # Training images are four times as many for their flips; the other splits are evaluated after each epoch.
    for split in sorted(needed, key=lambda split: split == "train"):
        if needed[split] <= room:
            fitting.append(split)
            room -= needed[split]
        else:
            logger.info(
                "%s: features of %s (%.2f GB) do not fit into the cache (%.2f GB left): encoded whenever they are used",
                task.name, split, needed[split] / 1e9, max(room, 0) / 1e9,
            )  # fmt: skip
    return [split for split in SPLITS if split in fitting]
