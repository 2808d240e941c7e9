"""Who keeps the others waiting, on made-up times."""

from __future__ import annotations

import itertools
import random

import pytest

from copernicus.platform.straggler import Stragglers, stragglers

HOSTS = ["a", "a", "b", "b"]


def test_of_two_ranks_the_slow_one_is_found():
    """A median of both would hide a rank of up to three times the other's time."""
    assert stragglers([0.1, 0.16]) == {1}
    assert stragglers([0.1, 0.14]) == set()


def test_nobody():
    assert stragglers([0.2, 0.21, 0.19, 0.25]) == set()
    assert stragglers([0.2]) == set()
    assert stragglers([0.001, 0.001, 0.001, 0.015]) == set()  # 15 times, and yet nothing


def test_a_whole_slow_node():
    assert stragglers([0.1, 0.1, 0.1, 0.1, 0.3, 0.31]) == {4, 5}


def test_let_off_only_when_it_keeps_up():
    assert stragglers([0.1, 0.1, 0.13], before={2}) == {2}
    assert stragglers([0.1, 0.1, 0.13]) == set()
    assert stragglers([0.1, 0.1, 0.119], before={2}) == set()


STEP_S = 0.5


CLOCK = itertools.count()


def feed(watch: Stragglers, busy: list[float], windows: int = 1) -> list[str]:
    """Whole windows of noisy steps; what was said."""
    rng = random.Random(0)
    said = []
    for _ in range(windows * int(watch.window_s / STEP_S + 1)):
        said.append(watch([b * rng.uniform(0.9, 1.1) for b in busy], next(CLOCK) * STEP_S))
    return [line for line in said if line]


def test_told_once_when_it_begins_and_once_when_it_ends():
    watch = Stragglers(HOSTS, window_s=10)
    assert feed(watch, [0.2, 0.2, 0.2, 0.2], 5) == []
    [began] = feed(watch, [0.2, 0.2, 0.5, 0.2], 20)
    assert began.startswith("rank 2 on b takes 2.")
    assert 2.4 <= float(began.split("takes ")[1].split()[0]) <= 2.6
    assert feed(watch, [0.2, 0.2, 0.27, 0.2], 5) == []  # better, and not yet good
    assert feed(watch, [0.2, 0.2, 0.5, 0.2], 5) == []
    [ended] = feed(watch, [0.2, 0.2, 0.2, 0.2], 5)
    assert ended == "rank 2 on b keeps up again"
    [again] = feed(watch, [0.2, 0.2, 0.5, 0.2], 5)
    assert "rank 2" in again


def test_a_pause_is_nobodys_fault():
    watch = Stragglers(HOSTS, window_s=10)
    said = [watch([0.2, 0.2, 0.2, 5.0 if step % 20 == 19 else 0.2], step * STEP_S) for step in range(400)]
    assert not any(said)


def test_another_number_of_ranks():
    with pytest.raises(ValueError, match="3 ranks, but 4 hosts"):
        Stragglers(HOSTS)([1, 2, 3], 0.0)
