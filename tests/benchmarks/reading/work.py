"""What a side of the reading benchmark is asked to do: the words that both sides and the command share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Work:
    """One measurement.

    task: "slices" (what a draw uses of each sensor, as arrays of its own, no crop) or "batches" (random crop and flip,
    stacked to torch tensors). workers: processes beside the consuming one; 0: none. once: a single pass over all grids
    instead of an endless stream. sizes: sensor -> side of the crops, pixels.
    """

    task: str
    shards: tuple[str, ...]
    sizes: dict[str, int]
    workers: int = 0
    batch_size: int = 16
    shuffle_buffer: int = 100
    once: bool = False


class Side(Protocol):
    """A loader under test. Each call is timed on its own, in this order, in a process of its own."""

    def prepare(self, work: Work) -> None:
        """Imports, and services that a training run has anyway. Not part of the start-up."""

    def index(self, work: Work) -> Any:
        """What must be known before the first sample can be asked for; None where there is nothing."""

    def stream(self, work: Work, index: Any) -> Iterator[int]:
        """Delivers, and says after each delivery how many samples it held."""
