"""Encoding a split into an entry of the feature store: batches of sample numbers, each read, encoded and written to its
place by a pool of Ray Data actors, or by the same object in this process.

What a batch holds is the same whoever encodes it, so the number of actors does not change a feature. Two calls at a time
run in each actor: one reads its images while the other has the encoder.

Shapes: F flips, B batch.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from copernicus.datasets.bench.reader import TaskDataset
from copernicus.datasets.bench.task import Preset, Task
from copernicus.datasets.sensors import InputError
from copernicus.models.encoder import Encoder
from copernicus.platform.encoding import FLIPS, Precision, collate, flipped, stored_features, stored_targets
from copernicus.platform.feature_store import Chunk, Writer, finish, missing, resume

CALLS = 2
"""Batches that an actor has in hand: one is read while the other is encoded."""

Progress = Callable[[str, int, int], None]  # split, samples done, samples in all


@dataclass(frozen=True)
class Source:
    """A split, as any process can open it."""

    task: Task
    folder: str
    split: str
    preset: Preset
    image_size: int | None

    def open(self) -> TaskDataset:
        return self.task.open(self.folder, self.split, self.preset, self.image_size)


@dataclass(frozen=True)
class Pool:
    """Actors that encode, and what each has of the cluster; 0 actors: this process encodes, where the encoder lies."""

    workers: int = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0

    def check(self) -> None:
        """Refuse a pool that no node of the cluster could ever hold one actor of: Ray would wait for it forever.

        Raises:
            InputError: there is no such node.
        """
        import ray

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        asked = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        if not any(all(node.get(name, 0) >= number for name, number in asked.items()) for node in nodes):
            largest = {name: max(node.get(name, 0) for node in nodes) for name in asked}
            raise InputError(
                f"encoding: a worker with {self.cpus_per_worker:g} CPUs and {self.gpus_per_worker:g} GPUs fits no node "
                f"(at most {largest['CPU']:g} CPUs and {largest['GPU']:g} GPUs); ask for less"
            )


class BatchEncoder:
    """Reads, encodes and writes batches of a split. Calls may come from several threads; the encoder serves one.

    Args:
        encoder: the encoder, or a Ray reference to it.
        folder: of the entry that is being written.
        fingerprint: of the split's files where the job was begun.
        device: where the encoder is put; None: it stays where it is.
    """

    def __init__(
        self,
        encoder: Any,
        source: Source,
        flips: int,
        precision: Precision,
        folder: str,
        fingerprint: str,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.encoder, self.source, self.flips, self.precision = encoder, source, FLIPS[:flips], precision
        self.folder, self.fingerprint, self.device, self.threads = Path(folder), fingerprint, device, threads
        self._dataset: TaskDataset | None = None
        self._opening, self._encoding = threading.Lock(), threading.Lock()

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[str]]:
        """Columns ``start`` and ``stop`` of batches -> column ``chunk``, a `Chunk` as JSON for each.

        Raises:
            InputError: files of the task, or the cache, are not here as they are where the job was begun.
            ValueError: features are not finite.
        """
        if self.threads is not None:
            # Ray gives a task one thread for each CPU that it asked for, and one with a share of one gets all.
            torch.set_num_threads(self.threads)
        return {
            "chunk": [self._batch(int(a), int(b)).to_json() for a, b in zip(rows["start"], rows["stop"], strict=True)]
        }

    def _batch(self, start: int, stop: int) -> Chunk:
        dataset = self._open()
        task, batch = dataset.task, [dataset[i] for i in range(start, stop)]
        images, metadata = collate(batch)
        sensors, ids = task.sensors(dataset.preset), [sample["id"] for sample in batch]
        with self._encoding:
            flips = [
                stored_features(self.encoder, task, flipped(images, axes), metadata, sensors, self.precision, ids)
                for axes in self.flips
            ]
        levels = [np.stack(level) for level in zip(*flips, strict=True)]
        return Writer(self.folder, len(dataset)).write(start, levels, stored_targets(task, batch))

    def _open(self) -> TaskDataset:
        with self._opening:  # here and not when made: what is wrong is then said by a call, in whole
            if self._dataset is None:
                if not self.folder.is_dir():
                    raise InputError(
                        f"the feature cache {self.folder.parent.parent} is not seen {_here()}; "
                        f"put sweep.cache on a folder that all nodes share"
                    )
                dataset = self.source.open()
                if dataset.fingerprint() != self.fingerprint:
                    raise InputError(
                        f"{self.source.task.name}: the files of {dataset.root} {_here()} are not those where the sweep "
                        f"was begun (sizes or times differ); put sweep.data on a folder that all nodes share"
                    )
                if not isinstance(self.encoder, torch.nn.Module):
                    import ray

                    self.encoder = ray.get(self.encoder)
                if self.device is not None:
                    self.encoder.to(self.device)
                self._dataset = dataset
            return self._dataset


def encode_split(
    folder: Path,
    encoder: Encoder,
    source: Source,
    dataset: TaskDataset,
    flips: int,
    precision: Precision,
    batch_size: int,
    pool: Pool,
    progress: Progress | None,
) -> None:
    """Encode a split into a folder of the store, going on from what an interrupted encoding left there.

    Raises:
        InputError: something is wrong with the task's files.
        ValueError: features are not finite.
    """
    samples = len(dataset)
    chunks = resume(folder, samples)
    batches = missing(chunks, samples, batch_size)
    settings = (source, flips, precision, str(folder), dataset.fingerprint())
    run = (
        _with_ray(pool, encoder, settings, batches)
        if pool.workers and batches
        else _here_and_now(encoder, settings, batches)
    )
    done = sum(chunk.stop - chunk.start for chunk in chunks)
    with contextlib.closing(run):
        for chunk in run:
            chunks.append(chunk)
            done += chunk.stop - chunk.start
            if progress is not None:
                progress(source.split, done, samples)
    finish(folder, chunks, dataset.ids)


def _here_and_now(
    encoder: Encoder, settings: tuple[Any, ...], batches: list[tuple[int, int]]
) -> Generator[Chunk, None, None]:
    worker = BatchEncoder(encoder, *settings)
    rows = ({"start": np.array([start]), "stop": np.array([stop])} for start, stop in batches)
    with ThreadPoolExecutor(CALLS) as executor:
        # No more than what an actor has in hand: all batches at once would be read ahead of the encoder.
        running = [executor.submit(worker, row) for row in itertools.islice(rows, CALLS)]
        try:
            while running:
                (text,) = running.pop(0).result()["chunk"]
                running += [executor.submit(worker, row) for row in itertools.islice(rows, 1)]
                yield Chunk.from_json(text)
        finally:
            for future in running:
                future.cancel()


def _with_ray(
    pool: Pool, encoder: Any, settings: tuple[Any, ...], batches: list[tuple[int, int]]
) -> Generator[Chunk, None, None]:
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayTaskError

    from copernicus.platform.stream import quiet_context

    pool.check()
    quiet_context()
    device = "cuda" if pool.gpus_per_worker else "cpu"
    # An encoder on this process's GPU would be unpickled onto one there.
    reference = ray.put(copy.deepcopy(encoder).cpu())
    rows = ray.data.from_items(
        [{"start": start, "stop": stop} for start, stop in batches], override_num_blocks=len(batches)
    ).map_batches(
        BatchEncoder,
        batch_size=1,
        fn_constructor_args=(reference, *settings, device, max(1, int(pool.cpus_per_worker))),
        compute=ActorPoolStrategy(
            size=min(pool.workers, len(batches)),
            max_concurrent_calls_per_actor=CALLS,
            max_tasks_in_flight_per_actor=2 * CALLS,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.cpus_per_worker,
        num_gpus=pool.gpus_per_worker or None,
    )
    try:
        for row in rows.iter_rows():
            yield Chunk.from_json(row["chunk"])
    except RayTaskError as error:
        cause = _cause(error)
        if isinstance(cause, (OSError, ValueError)):
            raise cause from None
        raise


def _cause(error: BaseException) -> BaseException:
    """What a worker's own code raised, from beneath what Ray wraps it in."""
    seen = error
    while (below := getattr(seen, "cause", None) or seen.__cause__) is not None:
        seen = below
    return seen


def _here() -> str:
    import socket

    return f"on node {socket.gethostname()}"
