"""Encoding splits into entries of the feature store: batches of sample numbers, each read, encoded and written to its
place by a pool of Ray Data actors, or by the same object in this process.

What a batch holds is the same whoever encodes it, so the number of actors does not change a feature. Several
calls at a time run in each actor: one has the encoder, and on each of its CPUs one reads images meanwhile.

Shapes: F flips, B batch.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from copernicus.datasets.bench.reader import TaskDataset
from copernicus.datasets.bench.task import Preset, Task
from copernicus.datasets.sensors import InputError
from copernicus.models.encoder import Encoder
from copernicus.platform.encoding import FLIPS, Precision, collate, flipped, stored_features, stored_targets
from copernicus.platform.feature_store import Chunk, Writer, finish, missing, resume
from copernicus.platform.session import autoscales

Progress = Callable[[str, int, int], None]  # split, samples done, samples in all


@dataclass(frozen=True)
class Job:
    """A split to encode into a folder of the store, as any process can open it.

    ``fingerprint``: of the split's files, where the job was begun; ``flips``: the first ones of ``FLIPS``.
    """

    folder: str
    task: Task
    data: str
    split: str
    preset: Preset
    image_size: int | None
    flips: int
    fingerprint: str

    def open(self) -> TaskDataset:
        """The samples, where data and store are as they were.

        Raises:
            InputError: they are not; on another node, most likely.
        """
        if not Path(self.folder).is_dir():
            raise InputError(
                f"the feature cache {Path(self.folder).parent.parent} is not seen on node {socket.gethostname()}; put "
                f"sweep.cache on a folder that all nodes share"
            )
        dataset = self.task.open(self.data, self.split, self.preset, self.image_size)
        if dataset.fingerprint() != self.fingerprint:
            raise InputError(
                f"{self.task.name}: the files of {dataset.root} on node {socket.gethostname()} have other sizes or times "
                f"than where the sweep was begun; put sweep.data on a folder that all nodes share"
            )
        return dataset


@dataclass(frozen=True)
class Pool:
    """Actors that encode, and what each has of the cluster; 0 actors: this process encodes, where the encoder lies."""

    workers: int = 0
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 0.0

    @property
    def calls(self) -> int:
        """Batches that a worker has in hand: one that is encoded, and on each of its CPUs one that is read."""
        return 1 + max(1, int(self.cpus_per_worker))

    def check(self) -> None:
        """Refuse a pool that no node of the cluster could ever hold one actor of: Ray would wait for it forever. What a
        cluster that brings nodes by itself will have is not known.

        Raises:
            InputError: there is no such node.
        """
        import ray

        if autoscales():
            return
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        asked = {"CPU": self.cpus_per_worker, "GPU": self.gpus_per_worker}
        if not any(all(node.get(name, 0) >= number for name, number in asked.items()) for node in nodes):
            largest = {name: max(node.get(name, 0) for node in nodes) for name in asked}
            raise InputError(
                f"encoding: a worker with {self.cpus_per_worker:g} CPUs and {self.gpus_per_worker:g} GPUs fits no node "
                f"(at most {largest['CPU']:g} CPUs and {largest['GPU']:g} GPUs); ask for less"
            )


class BatchEncoder:
    """Reads, encodes and writes batches of splits. Calls may come from several threads; the encoder serves one.

    Args:
        encoder: the encoder, or a Ray reference to it.
        device: where the encoder is put; None: it stays where it is.
        threads: for torch to use; None: as many as it does.
    """

    def __init__(
        self,
        encoder: Any,
        jobs: Sequence[Job],
        precision: Precision,
        device: str | None = None,
        threads: int | None = None,
    ) -> None:
        self.encoder, self.jobs, self.precision, self.device, self.threads = encoder, jobs, precision, device, threads
        self._datasets: dict[int, TaskDataset] = {}
        self._opening, self._encoding = threading.Lock(), threading.Lock()

    def __call__(self, rows: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """Columns ``job``, ``start`` and ``stop`` of batches -> ``job`` and ``chunk``, a `Chunk` as JSON.

        Raises:
            InputError: files of the task, or the cache, are not here as they are where the job was begun.
            ValueError: features are not finite.
        """
        if self.threads is not None:
            # Ray gives a task one thread for each CPU that it asked for, and one with a share of one gets all.
            torch.set_num_threads(self.threads)
        batches = zip(rows["job"], rows["start"], rows["stop"], strict=True)
        chunks = [self._encode(int(job), int(start), int(stop)).to_json() for job, start, stop in batches]
        return {"job": list(rows["job"]), "chunk": chunks}

    def _encode(self, number: int, start: int, stop: int) -> Chunk:
        dataset, job = self._open(number), self.jobs[number]
        task, batch = dataset.task, [dataset[i] for i in range(start, stop)]
        images, metadata = collate(batch)
        sensors, ids = task.sensors(dataset.preset), [sample["id"] for sample in batch]
        with self._encoding:
            flips = [
                stored_features(self.encoder, task, flipped(images, axes), metadata, sensors, self.precision, ids)
                for axes in FLIPS[: job.flips]
            ]
        levels = [np.stack(level) for level in zip(*flips, strict=True)]
        return Writer(Path(job.folder), len(dataset)).write(start, levels, stored_targets(task, batch))

    def _open(self, number: int) -> TaskDataset:
        with self._opening:  # here and not when made: what is wrong is then said by a call, in whole
            if number not in self._datasets:
                self._datasets[number] = self.jobs[number].open()
                if not isinstance(self.encoder, torch.nn.Module):
                    import ray

                    self.encoder = ray.get(self.encoder)
                if self.device is not None:
                    self.encoder.to(self.device)
            return self._datasets[number]


def encode_splits(
    encoder: Encoder,
    jobs: Sequence[Job],
    ids: Sequence[Sequence[str]],
    precision: Precision,
    batch_size: int,
    pool: Pool,
    progress: Progress | None,
) -> Iterator[int]:
    """Encode splits, going on from what an interrupted encoding left in their folders; yields the number of each job
    when it is done.

    Args:
        ids: of the samples of each job.

    Raises:
        InputError: something is wrong with the task's files.
        ValueError: features are not finite.
    """
    chunks = [resume(Path(job.folder), len(names)) for job, names in zip(jobs, ids, strict=True)]
    todo = [missing(kept, len(names), batch_size) for kept, names in zip(chunks, ids, strict=True)]
    batches = [(number, start, stop) for number, ranges in enumerate(todo) for start, stop in ranges]
    left = [len(ranges) for ranges in todo]
    done = [sum(chunk.stop - chunk.start for chunk in kept) for kept in chunks]
    for number, job in enumerate(jobs):
        if left[number] == 0:
            finish(Path(job.folder), chunks[number], ids[number])
            yield number
    if not batches:
        return
    run = (_with_ray if pool.workers else _here)(pool, encoder, jobs, precision, batches)
    with contextlib.closing(run):
        for number, chunk in run:
            chunks[number].append(chunk)
            left[number] -= 1
            done[number] += chunk.stop - chunk.start
            if progress is not None:
                progress(jobs[number].split, done[number], len(ids[number]))
            if left[number] == 0:
                finish(Path(jobs[number].folder), chunks[number], ids[number])
                yield number


Batches: TypeAlias = Sequence[tuple[int, int, int]]  # job, first sample, the one after the last
Done: TypeAlias = Generator[tuple[int, Chunk], None, None]


def _here(pool: Pool, encoder: Encoder, jobs: Sequence[Job], precision: Precision, batches: Batches) -> Done:
    worker = BatchEncoder(encoder, jobs, precision)
    rows = (dict(zip(("job", "start", "stop"), np.array(batch)[:, None], strict=True)) for batch in batches)
    with ThreadPoolExecutor(pool.calls) as executor:
        # No more than what an actor has in hand: all batches at once would be read ahead of the encoder.
        running = [executor.submit(worker, row) for row in itertools.islice(rows, pool.calls)]
        try:
            while running:
                result = running.pop(0).result()
                running += [executor.submit(worker, row) for row in itertools.islice(rows, 1)]
                yield int(result["job"][0]), Chunk.from_json(result["chunk"][0])
        finally:
            for future in running:
                future.cancel()


def _with_ray(pool: Pool, encoder: Any, jobs: Sequence[Job], precision: Precision, batches: Batches) -> Done:
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayTaskError

    from copernicus.platform.stream import quiet_context

    pool.check()
    # What a worker raises arrives as it is: wrapped in Ray Data's own exception it would have lost its type.
    quiet_context().raise_original_map_exception = True
    device = "cuda" if pool.gpus_per_worker else "cpu"
    # An encoder on this process's GPU would be unpickled onto one there.
    reference = ray.put(copy.deepcopy(encoder).cpu())
    rows = ray.data.from_items(
        [{"job": number, "start": start, "stop": stop} for number, start, stop in batches],
        override_num_blocks=len(batches),
    ).map_batches(
        BatchEncoder,
        batch_size=1,
        fn_constructor_args=(reference, jobs, precision, device, max(1, int(pool.cpus_per_worker))),
        compute=ActorPoolStrategy(
            size=min(pool.workers, len(batches)),
            max_concurrent_calls_per_actor=pool.calls,
            max_tasks_in_flight_per_actor=2 * pool.calls,
            enable_true_multi_threading=True,
        ),
        num_cpus=pool.cpus_per_worker,
        num_gpus=pool.gpus_per_worker or None,
    )
    try:
        for row in rows.iter_rows():
            yield row["job"], Chunk.from_json(row["chunk"])
    except RayTaskError as error:
        cause = cause_of(error)
        if isinstance(cause, (OSError, ValueError)):
            raise cause from None
        raise


def cause_of(error: BaseException) -> BaseException:
    """What a worker's own code raised, from beneath what Ray wraps it in."""
    seen = error
    while (below := getattr(seen, "cause", None) or seen.__cause__) is not None:
        seen = below
    return seen
