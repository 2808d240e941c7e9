"""Our side of the reading benchmark: everything it knows of the engine's interface is in this file."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from reading.work import Work

from copernicus.datasets.index import GridEntry, GridIndex, index_shards
from copernicus.datasets.order import Order
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import Problem
from copernicus.datasets.slices import DrawReader, load_shard
from copernicus.platform.stream import Share, batches
from copernicus.platform.to_device import on_device, tensors

SAMPLES = 30_000  # of an endless stream: more than a window can take


def prepare(work: Work) -> None:
    torch.set_num_threads(1)
    if work.task == "batches" and work.workers:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        import ray

        ray.init(
            address="local",
            num_cpus=max(2, work.workers),
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=2 << 30,
            _temp_dir=tempfile.gettempdir(),
        )


def index(work: Work) -> GridIndex:
    return index_shards(list(work.shards))


def stream(work: Work, index: GridIndex) -> Iterator[int]:
    epochs = 1 if work.once else -(-SAMPLES // len(index))
    order = Order(len(index), epochs=epochs)
    reader = DrawReader(tuple(SENSORS[name] for name in work.sizes), work.sizes)
    if work.task == "slices":
        return _slices(index, order, reader)
    return _with_ray(work, index, order, reader) if work.workers else _in_process(work, index, order, reader)


def _slices(index: GridIndex, order: Order, reader: DrawReader) -> Iterator[int]:
    """Patch and date of every sensor, the rows that the crop needs. Kept until the next one, as a consumer would."""
    for _, places in _blocks(index, order, 16):
        for grid, epoch, draw in places:
            problems: list[Problem] = []
            used = load_shard(grid, reader.choose(grid, epoch, draw), problems)
            assert len(used) == len(reader.sensors), problems
            yield 1


def _in_process(work: Work, index: GridIndex, order: Order, reader: DrawReader) -> Iterator[int]:
    for count, places in _blocks(index, order, work.batch_size):
        _tensors(reader.batch(places))
        yield count


def _blocks(index: GridIndex, order: Order, size: int) -> Iterator[tuple[int, list[tuple[GridEntry, int, int]]]]:
    for first in range(0, order.samples, size):
        places = [order.locate(p) for p in range(first, min(first + size, order.samples))]
        entries = index.entries(grid for _, _, grid in places)
        yield len(places), [(e, epoch, draw) for e, (epoch, draw, _) in zip(entries, places, strict=True)]


def _with_ray(work: Work, index: GridIndex, order: Order, reader: DrawReader) -> Iterator[int]:
    import ray

    stream = batches(Share(ray.put(index), order, reader, work.batch_size, 0, 1), data_cpus=work.workers)
    for columns, _ in on_device(stream, torch.device("cpu")):
        _check(columns)
        yield int((columns["key"] != "").sum())


def _check(columns: dict[str, np.ndarray]) -> None:
    problems = [p for p in columns["problems"] if p != "[]"]
    assert not problems, problems[0]


def _tensors(columns: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    _check(columns)
    return tensors(columns, torch.device("cpu"))
