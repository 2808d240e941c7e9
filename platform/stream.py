"""Ray Data: the stream of training batches of one rank, in the global order."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from ray.data._internal.execution.execution_callback import ExecutionCallback  # of a documented DataContext field

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


def quiet_context() -> Any:
    """Ray Data's settings of this process: no progress bars of its own, a scheduling loop that rests."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    if Pause not in context.custom_execution_callback_classes:
        context.custom_execution_callback_classes.append(Pause)
    return context


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
    """This rank's share of every global batch from ``start_step`` on, over all epochs, as columns (see
    `DrawReader.batch`).

    ``index``: a Ray object reference to the `GridIndex`, so that the read tasks of a node share one copy.
    One long stream runs through all epochs: there is no barrier, and no idle gap, between two of them.
    """
    import ray

    share = order.share(batch_size, world_size)
    samples = (order.steps(batch_size) - start_step) * share
    if samples <= 0:
        return
    quiet_context().execution_options.preserve_order = True
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
def _index(index: Any) -> GridIndex:
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
    # Ray gives a task one thread for each CPU that it asked for, and a task with a share of one gets all.
    torch.set_num_threads(1)
    positions = order.positions(rows["id"], rank, world_size, batch_size, start_step)
    places = [order.locate(int(position)) if position >= 0 else None for position in positions]
    entries = iter(_index(index).entries(place[2] for place in places if place is not None))
    return reader.batch([None if place is None else (next(entries), *place[:2]) for place in places])


def on_device(
    stream: Iterator[dict[str, np.ndarray]], device: torch.device
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]]:
    """Each batch's columns, and its numbers as tensors on the device. On a GPU the next batch is copied, from pinned
    memory and on a stream of its own, while the model works on this one."""
    if device.type != "cuda":
        for columns in stream:
            yield columns, tensors(columns, device)
        return
    copying = torch.cuda.Stream(device)
    ahead: tuple[dict[str, np.ndarray], dict[str, torch.Tensor], torch.cuda.Event] | None = None
    for columns in stream:
        with torch.cuda.stream(copying):
            batch = tensors(columns, device)
            copied = torch.cuda.Event()
            copied.record(copying)
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = columns, batch, copied
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(
    columns: dict[str, np.ndarray], batch: dict[str, torch.Tensor], copied: torch.cuda.Event
) -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    current = torch.cuda.current_stream()
    current.wait_event(copied)
    for tensor in batch.values():
        tensor.record_stream(current)  # the allocator may not give the memory away while the model reads it
    return columns, batch


def tensors(columns: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """The columns that the model takes."""
    chosen = {k: v for k, v in columns.items() if k not in ("key", "problems", "epoch")}
    if device.type == "cuda":
        return {k: torch.from_numpy(np.array(v)).pin_memory().to(device, non_blocking=True) for k, v in chosen.items()}
    # Ray hands out read-only memory; a copy keeps torch from warning about it.
    return {k: torch.from_numpy(np.array(v)) for k, v in chosen.items()}
