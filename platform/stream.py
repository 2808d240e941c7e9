"""Ray Data: the stream of training batches of one rank, in the global order."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
import ray.data
import torch
from ray.data import Datasource, ReadTask
from ray.data._internal.execution.execution_callback import ExecutionCallback  # of a documented DataContext field
from ray.data.block import Block, BlockAccessor, BlockMetadata

from copernicus.datasets.index import GridIndex
from copernicus.datasets.order import Order
from copernicus.datasets.slices import DrawReader

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
BLOCKS_PER_SEGMENT = 1024
"""Ray Data lists all blocks of a dataset before it reads the first; a long run would list millions."""


def quiet_context() -> Any:
    """Ray Data's settings of this process: no progress bars of its own, a scheduling loop that rests."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if Pause not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Pause)
    return context


class Draws(Datasource):
    """Blocks of consecutive local sample numbers of one rank, each read by a task of its own: a datasource rather than a
    map over a range, whose own tasks would want a CPU each and pass every block through one more queue."""

    def __init__(self, share: Share, first: int, stop: int, rows_per_block: int):
        self.share, self.first, self.stop, self.rows = share, first, stop, rows_per_block

    def estimate_inmemory_data_size(self) -> int:
        return (self.stop - self.first) * self.share.reader.row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        tasks, row_bytes = [], self.share.reader.row_bytes
        for start in range(self.first, self.stop, self.rows):
            numbers = range(start, min(start + self.rows, self.stop))
            size = len(numbers) * row_bytes
            metadata = BlockMetadata(len(numbers), size, input_files=None, exec_stats=None)
            tasks.append(ReadTask(functools.partial(_block, self.share, numbers), metadata))
        return tasks


@dataclass(frozen=True)
class Share:
    """What a rank reads: its contiguous share of every global batch from ``start_step`` on, over all epochs.

    ``index``: a Ray object reference to the `GridIndex`, so that the read tasks of a node share one copy.
    """

    index: Any
    order: Order
    reader: DrawReader
    batch_size: int
    rank: int
    world_size: int
    start_step: int = 0

    @property
    def rows_per_batch(self) -> int:
        return self.order.share(self.batch_size, self.world_size)

    @property
    def rows(self) -> int:
        return (self.order.steps(self.batch_size) - self.start_step) * self.rows_per_batch

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of these local sample numbers (see `DrawReader.batch`)."""
        positions = self.order.positions(numbers, self.rank, self.world_size, self.batch_size, self.start_step)
        places = [self.order.locate(int(position)) if position >= 0 else None for position in positions]
        entries = iter(_index(self.index).entries(place[2] for place in places if place is not None))
        return self.reader.batch([None if place is None else (next(entries), *place[:2]) for place in places])


def batches(share: Share, data_cpus: float = 1.0) -> Iterator[dict[str, np.ndarray]]:
    """This rank's rows of one global batch after another, as columns.

    One long stream runs through all epochs: there is no barrier, and no idle gap, between two of them. It is cut into
    segments of many blocks, and the next segment's first blocks are read before the last ones of this are used up.
    """
    context = quiet_context()
    context.execution_options.preserve_order = True
    size = share.rows_per_batch
    # A block is some whole batches, or a part of one: a rank's 128 rows of all sensors would be a block of 1 GB.
    rows_per_block = -(-ROWS_PER_BLOCK // size) * size if size <= ROWS_PER_BLOCK else ROWS_PER_BLOCK
    rows_per_segment = max(1, rows_per_block * BLOCKS_PER_SEGMENT // size) * size
    cpus = data_cpus / share.world_size

    def segment(first: int) -> Iterator[dict[str, np.ndarray]]:
        stop = min(first + rows_per_segment, share.rows)
        dataset = ray.data.read_datasource(
            Draws(share, first, stop, rows_per_block),
            override_num_blocks=-(-(stop - first) // rows_per_block),
            num_cpus=min(1.0, cpus),
            concurrency=max(1, round(cpus)),
        )
        return iter(dataset.iter_batches(batch_size=size, batch_format="numpy", prefetch_batches=2))

    with ThreadPoolExecutor(1) as pool:
        starts = range(0, share.rows, rows_per_segment)
        ahead: Future | None = None
        for first in starts:
            (head, rest), ahead = ahead.result() if ahead is not None else _begun(segment(first)), None
            following = first + rows_per_segment
            steps = (min(following, share.rows) - first) // size
            yield from head
            for step, columns in enumerate(rest, 1):
                if following < share.rows and step == steps - 1 - max(1, steps // 50):
                    ahead = pool.submit(_begun, segment(following))
                yield columns


def _begun(batches: Iterator[dict[str, np.ndarray]]) -> tuple[list[dict[str, np.ndarray]], Iterator]:
    """The first batch, which starts the reading, and the rest."""
    return [next(batches)], batches


@functools.lru_cache(maxsize=2)
def _index(index: Any) -> GridIndex:
    return ray.get(index)


def _block(share: Share, numbers: range) -> Iterator[Block]:
    # Ray gives a task one thread for each CPU that it asked for, and a task with a share of one gets all.
    torch.set_num_threads(1)
    yield BlockAccessor.batch_to_block(share.read(np.arange(numbers.start, numbers.stop)))
