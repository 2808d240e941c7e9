"""Ray Data: the stream of training batches of one rank, in the global order."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.data._internal.execution.execution_callback import ExecutionCallback  # of a documented DataContext field

from copernicus.datasets.order import Order
from copernicus.datasets.slices import DrawReader, GridIndex, collate

if TYPE_CHECKING:
    from ray.data._internal.execution.streaming_executor import StreamingExecutor


class Pause(ExecutionCallback):
    """Lets Ray Data's scheduling loop rest between its rounds.

    While batches are ready and the training loop has not asked for them, the loop turns without waiting, in this very
    process: half of a rank's processor time, taken from the training loop beside it (LOG.md).
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        time.sleep(0.02)


ROWS_PER_BLOCK = 16  # tried: blocks of 8 gave half the throughput of 16 (LOG.md)


def batches(
    index: Any,
    order: Order,
    reader: DrawReader,
    batch_size: int,
    rank: int,
    world_size: int,
    start_step: int = 0,
    data_cpus: float = 1.0,
) -> Iterator[dict[str, np.ndarray]]:
    """This rank's share of every global batch from ``start_step`` on, over all epochs, as columns (see `collate`).

    ``index``: a Ray object reference to the `GridIndex`, so that the read tasks of a node share one copy.
    One long stream runs through all epochs: there is no barrier, and no idle gap, between two of them.
    """
    import ray

    share = order.share(batch_size, world_size)
    samples = (order.steps(batch_size) - start_step) * share
    if samples <= 0:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    if Pause not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Pause)
    rows_per_block = -(-max(share, ROWS_PER_BLOCK) // share) * share
    dataset = ray.data.range(samples, override_num_blocks=-(-samples // rows_per_block)).map_batches(
        functools.partial(
            _read, index=index, order=order, reader=reader, batch_size=batch_size, rank=rank, world_size=world_size,
            start_step=start_step,
        ),
        batch_size=rows_per_block,
        num_cpus=min(1.0, data_cpus / world_size),
        concurrency=max(1, round(data_cpus / world_size)),
        zero_copy_batch=True,
    )  # fmt: skip
    yield from dataset.iter_batches(batch_size=share, batch_format="numpy", prefetch_batches=2)


@functools.lru_cache(maxsize=2)
def _grids(index: Any) -> GridIndex:
    import ray

    return ray.get(index)


def _read(
    rows: dict[str, np.ndarray],
    index: Any,
    order: Order,
    reader: DrawReader,
    batch_size: int,
    rank: int,
    world_size: int,
    start_step: int,
) -> dict[str, np.ndarray]:
    grids = _grids(index).grids
    draws = []
    for position in order.positions(rows["id"], rank, world_size, batch_size, start_step):
        if position < 0:
            draws.append(reader.empty())
            continue
        epoch, draw, grid = order.locate(int(position))
        draws.append(reader.read(grids[grid], epoch, draw))
    return collate(draws, reader.sensors)
