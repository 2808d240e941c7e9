"""Leaderboards for tests."""

from collections.abc import Sequence


def plan_cells(tasks: Sequence[str], encoders: Sequence[str], seeds: Sequence[int]) -> dict:
    """What a sweep of all these plans: the same seeds in every cell."""
    return {(task, encoder): tuple(seeds) for task in tasks for encoder in encoders}
