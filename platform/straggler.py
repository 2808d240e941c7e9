"""Which worker keeps the others waiting.

A step ends when the slowest rank is done: each waits for all in its collectives, so all steps take the same time and
nothing in them tells who is slow. What a rank does on its own is the time from a step's begin to its first collective:
waiting for data, and the forward pass. (DDP's backward pass has the reduction of gradients in it, and ends together.)
A slow disk, network, CPU or GPU shows there, for data and forward pass go through it. On a GPU the forward pass only
queues its kernels: there the clock is read behind a wait for the device, or shows data and network alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

TIMES_SLOWER = 1.5
TIMES_KEEPING_UP = 1.2
"""A straggler begins to be one at the first and ceases at the second, so that who is in between is not told of twice."""

LEAST_S = 0.02
"""By how much a straggler's step is longer at least, seconds: ratios of shorter times are noise."""


class Stragglers:
    """Told what every rank needed for a step (N numbers, N ranks), says now and then who is slow.

    Steps of ``window_s`` are judged together, by each rank's median, so that a pause (a checkpoint, a collection of garbage)
    is nobody's fault. An episode is told once when it begins and once when it ends.

    Args:
        hosts: of each rank, for the message.
    """

    def __init__(self, hosts: Sequence[str], window_s: float = 60.0):
        self.hosts, self.window_s = list(hosts), window_s
        self.slow: set[int] = set()
        self._steps: list[list[float]] = []
        self._begun: float | None = None

    def __call__(self, busy_N: Sequence[float], now: float) -> str | None:
        """What there is to say after this step, mostly None. ``now``: seconds, by any clock.

        Raises:
            ValueError: another number of ranks than of hosts.
        """
        if len(busy_N) != len(self.hosts):
            raise ValueError(f"{len(busy_N)} ranks, but {len(self.hosts)} hosts")
        self._steps.append(list(busy_N))
        if self._begun is None:
            self._begun = now
        if now - self._begun < self.window_s or len(self._steps) < 3:
            return None
        medians_N = [statistics.median(rank) for rank in zip(*self._steps, strict=True)]
        self._steps, self._begun = [], now
        slow = stragglers(medians_N, self.slow)
        began, ended, self.slow = slow - self.slow, self.slow - slow, slow
        lines = [_says(rank, medians_N, self.hosts[rank]) for rank in sorted(began)]
        lines += [f"rank {rank} on {self.hosts[rank]} keeps up again" for rank in sorted(ended)]
        return "\n".join(lines) or None


def stragglers(busy_N: Sequence[float], before: frozenset[int] | set[int] = frozenset()) -> set[int]:
    """The ranks that are `TIMES_SLOWER` than the median of the others; those of ``before`` are let off only below
    `TIMES_KEEPING_UP`. Seconds a step."""
    found = set()
    for rank, mine in enumerate(busy_N):
        others = _others(busy_N, rank)
        times = TIMES_KEEPING_UP if rank in before else TIMES_SLOWER
        if mine > times * others and mine - others >= LEAST_S:
            found.add(rank)
    return found


def _others(busy_N: Sequence[float], rank: int) -> float:
    """The median of all but ``rank``: of two ranks a median of both would be half of the slow one's."""
    others = [*busy_N[:rank], *busy_N[rank + 1 :]]
    return statistics.median(others) if others else busy_N[rank]


def _says(rank: int, busy_N: Sequence[float], host: str) -> str:
    mine, others = busy_N[rank], _others(busy_N, rank)
    ratio = f"{mine / others:.1f} times as long as the others" if others > 0 else "long while the others take no time"
    return (
        f"rank {rank} on {host} takes {ratio} to read its data and run the forward pass ({mine:.3g} s, others "
        f"{others:.3g} s a step), and every step waits for it; see what else runs on {host}, and how fast it reads"
    )
