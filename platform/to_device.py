"""Batches on their way to the device that trains on them."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import numpy as np
import torch

from copernicus.models.metadata import check_metadata


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
    """The columns that the model takes. On the CPU images are not copied: they may lie in Ray's read-only memory, and
    whoever takes them makes new ones, as `Sensor.normalize` does."""
    chosen = {k: v for k, v in columns.items() if k not in ("key", "problems", "epoch")}
    rows_X4 = _as_tensor(columns["metadata"]).flatten(0, 1)
    check_metadata(rows_X4, len(rows_X4))  # here, before it goes to a GPU: see `MaskedAutoencoder.hide`
    if device.type == "cuda":
        return {k: _as_tensor(v).pin_memory().to(device, non_blocking=True) for k, v in chosen.items()}
    return {k: _as_tensor(v) if k.startswith("x_") else torch.from_numpy(np.array(v)) for k, v in chosen.items()}


def _as_tensor(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of memory that is not to be written to
        return torch.from_numpy(array)
