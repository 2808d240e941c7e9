"""Which grid is drawn when, and with what randomness: pure functions of the seed, so that any number of workers, and any
restart, meets the same samples in the same global order."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np


def generator(*key: int | str) -> np.random.Generator:
    """A random generator that depends on its key alone, e.g. ``generator("crop", seed, epoch, grid_key, "s2_toa")``."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def uniform(*key: int | str) -> float:
    """A number in [0, 1) that depends on the key alone; cheaper than a generator where one number is all that is needed."""
    return (int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 11) / 2**53


@functools.lru_cache(maxsize=2)  # the pass that a process reads, and the next one where a block has rows of both
def permutation(seed: int, epoch: int, draw: int, size: int) -> np.ndarray:
    """The order of ``size`` grids in one pass over them."""
    drawn = generator("order", seed, epoch, draw).permutation(size)
    return drawn.astype(np.int32) if size < 2**31 else drawn  # half the memory of every process that reads


@dataclass(frozen=True)
class Order:
    """The global order of training samples: every epoch passes ``draws_per_grid`` times over all grids, each time in a
    new order. Position p of the stream is a fixed (epoch, draw, grid), whoever reads it."""

    grids: int
    seed: int = 0
    epochs: int = 1
    draws_per_grid: int = 1

    @property
    def samples_per_epoch(self) -> int:
        return self.grids * self.draws_per_grid

    @property
    def samples(self) -> int:
        return self.samples_per_epoch * self.epochs

    def steps(self, batch_size: int) -> int:
        """Global batches in all epochs; the last one may be smaller."""
        return -(-self.samples // batch_size)

    def locate(self, position: int) -> tuple[int, int, int]:
        """Position in the stream -> (epoch, draw, grid index)."""
        assert 0 <= position < self.samples, position
        passes, offset = divmod(position, self.grids)
        epoch, draw = divmod(passes, self.draws_per_grid)
        return epoch, draw, int(permutation(self.seed, epoch, draw, self.grids)[offset])

    def share(self, batch_size: int, world_size: int) -> int:
        """Samples of a global batch that each of ``world_size`` ranks takes, padding included."""
        return -(-batch_size // world_size)

    def positions(
        self, local: np.ndarray, rank: int, world_size: int, batch_size: int, start_step: int = 0
    ) -> np.ndarray:
        """A rank's local sample numbers (0, 1, ... from ``start_step`` on) -> positions in the stream.

        Each rank takes its contiguous share of every global batch. Batches are padded with -1 (no sample) up to a
        multiple of ``world_size``, so that all ranks take equally many steps of equal shape.
        """
        share = self.share(batch_size, world_size)
        steps, within = np.divmod(np.asarray(local), share)
        within = within + rank * share
        positions = (steps + start_step) * batch_size + within
        return np.where((within < batch_size) & (positions < self.samples), positions, -1)


@dataclass
class Coverage:
    """The proof that each epoch trains every grid exactly as often as asked: per epoch, how many samples were trained
    and the sum (modulo 2^64) of their grids' hashes. Ranks and attempts add up; a sample lost, doubled or swapped shows.
    """

    epochs: dict[int, tuple[int, int]] = field(default_factory=dict)

    def add(self, epochs: Iterable[int], keys: Iterable[str]) -> None:
        """Samples that were trained; a negative epoch is padding."""
        for epoch, key in zip(epochs, keys, strict=True):
            if epoch >= 0:
                self._sum(int(epoch), 1, key_hash(str(key)))

    def merge(self, other: Coverage) -> None:
        for epoch, (count, total) in other.epochs.items():
            self._sum(epoch, count, total)

    def _sum(self, epoch: int, count: int, total: int) -> None:
        before = self.epochs.get(epoch, (0, 0))
        self.epochs[epoch] = (before[0] + count, (before[1] + total) % 2**64)

    @staticmethod
    def expected(keys: Iterable[str], draws_per_grid: int) -> tuple[int, int]:
        """What a whole epoch over these grids adds up to."""
        hashes = [key_hash(key) for key in keys]
        return len(hashes) * draws_per_grid, sum(hashes) * draws_per_grid % 2**64


def key_hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
