"""Our side of the reading benchmark: everything it knows of the engine's interface is in this file."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator

import numpy as np
import torch
from reading.work import Work

from copernicus.datasets.order import Order, generator
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import LEADING_AXES
from copernicus.datasets.slices import DrawReader, GridIndex, collate, decode_member, index_shards
from copernicus.platform.stream import batches

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
    return index_shards(work.shards, list(work.sizes))


def stream(work: Work, index: GridIndex) -> Iterator[int]:
    sensors = tuple(SENSORS[name] for name in work.sizes)
    epochs = 1 if work.once else -(-SAMPLES // len(index.grids))
    order = Order(len(index.grids), epochs=epochs)
    if work.task == "slices":
        return _slices(work, index, order)
    reader = DrawReader(sensors, work.sizes)
    return _with_ray(work, index, order, reader) if work.workers else _in_process(work, index, order, reader)


def _slices(work: Work, index: GridIndex, order: Order) -> Iterator[int]:
    """Patch and date of every sensor, whole images. Kept until the next one, as a consumer would."""
    assert not work.workers
    for position in range(order.samples):
        epoch, draw, number = order.locate(position)
        grid = index.grids[number]
        used = {}
        with open(grid.shard, "rb") as shard:
            for name in work.sizes:
                offset, size = grid.members[name]
                shard.seek(offset)
                array = decode_member(shard.read(size), SENSORS[name])
                rng = generator("slice", epoch, draw, grid.key, name)
                at = tuple(int(rng.integers(n)) for n in array.shape[: len(LEADING_AXES[name])])
                used[name] = array[at].clone() if at else array
        yield 1


def _in_process(work: Work, index: GridIndex, order: Order, reader: DrawReader) -> Iterator[int]:
    for first in range(0, order.samples, work.batch_size):
        places = [order.locate(p) for p in range(first, min(first + work.batch_size, order.samples))]
        columns = collate([reader.read(index.grids[grid], epoch, draw) for epoch, draw, grid in places], reader.sensors)
        _tensors(columns)
        yield len(places)


def _with_ray(work: Work, index: GridIndex, order: Order, reader: DrawReader) -> Iterator[int]:
    import ray

    for columns in batches(ray.put(index), order, reader, work.batch_size, 0, 1, data_cpus=work.workers):
        _tensors({k: np.array(v) for k, v in columns.items()})  # Ray's are read-only; the training loop copies them too
        yield int((columns["key"] != "").sum())


def _tensors(columns: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    problems = [p for p in columns["problems"] if p != "[]"]
    assert not problems, problems[0]
    return {k: torch.from_numpy(v) for k, v in columns.items() if k not in ("key", "problems")}
