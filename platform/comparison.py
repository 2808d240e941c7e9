"""Encoders against each other: aggregates over tasks, and paired tests.

Shape suffixes: R resamples, T tasks, E encoders, N runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from copernicus.datasets.bench.task import Task
from copernicus.platform.leaderboard import Leaderboard, anchors
from copernicus.platform.statistics import (
    Estimate,
    holm,
    improvement,
    interquartile_mean,
    interval,
    paired_t,
    ranks,
    signed_rank,
)


@dataclass(frozen=True)
class Aggregate:
    """One encoder over the tasks that all compared encoders have."""

    encoder: str
    iqm: Estimate | None  # interquartile mean of normalised scores, over runs x tasks; None: no task has anchors
    mean: Estimate | None  # of the tasks' mean normalised scores
    rank: Estimate  # mean over tasks of the rank of the mean score, 1 is best


@dataclass(frozen=True)
class Aggregates:
    """``tasks``: those in the ranks; ``normalised``: those of them in the normalised scores. What was left out, and why."""

    rows: tuple[Aggregate, ...]
    tasks: tuple[Task, ...]
    normalised: tuple[Task, ...]
    left_out: tuple[str, ...]


def normalise(task: Task, values: np.ndarray) -> np.ndarray:
    """Scores with 0 at the task's published random encoder and 1 at its best published one; greater is better."""
    ends = anchors(task)
    assert ends is not None, task.name
    zero, one = ends
    return (np.asarray(values, dtype=float) - zero) / (one - zero)


def aggregate(board: Leaderboard) -> Aggregates:
    """Interquartile mean, mean normalised score and mean rank, over the tasks that all compared encoders have.

    Intervals are of a bootstrap stratified by task (arXiv 2108.13264): the runs of each cell are resampled, the tasks are
    not, so that they tell how another set of seeds would come out, not another set of tasks. How the score of a cell with one
    seed would vary is unknown, and then no interval is given; that of a closed form does not.
    """
    encoders = [e for e in board.encoders if any(board.values(t.name, e) for t in board.tasks)]
    tasks = [t for t in board.tasks if encoders and all(board.values(t.name, e) for e in encoders)]
    left_out = [f"{e} has no score and is not compared" for e in board.encoders if e not in encoders]
    for task in board.tasks:
        if task not in tasks and encoders:
            lacking = [e for e in encoders if not board.values(task.name, e)]
            left_out.append(f"{task.title} is left out: no score of {', '.join(lacking)}")
    scaled = [t for t in tasks if anchors(t) is not None]
    left_out += [
        f"{t.title} counts in ranks only: no published figures to normalise by" for t in tasks if t not in scaled
    ]
    if not tasks:
        return Aggregates((), (), (), tuple(left_out))

    # Signed, so that greater is better.
    sign = {t.name: 1 if t.higher_is_better else -1 for t in tasks}
    means_TE = np.array([[sign[t.name] * np.mean(board.values(t.name, e)) for e in encoders] for t in tasks])
    replicas_RTE = np.stack(
        [[sign[t.name] * board.replicas[t.name, e].mean(-1) for e in encoders] for t in tasks]
    ).transpose(2, 0, 1)
    rank_E, rank_RE = ranks(means_TE).mean(0), ranks(replicas_RTE).mean(1)
    varies = all(board.varies(t.name, e) for t in tasks for e in encoders)
    rows = []
    for i, encoder in enumerate(encoders):
        iqm = mean = None
        if scaled:
            pieces_N = [normalise(t, np.array(board.values(t.name, encoder))) for t in scaled]
            pieces_RN = [normalise(t, board.replicas[t.name, encoder]) for t in scaled]
            bounded = all(board.varies(t.name, encoder) for t in scaled)
            iqm = _estimate(
                interquartile_mean(np.concatenate(pieces_N)),
                interquartile_mean(np.concatenate(pieces_RN, axis=-1)),
                bounded,
            )
            mean = _estimate(
                np.mean([piece.mean() for piece in pieces_N]),
                np.mean([piece.mean(-1) for piece in pieces_RN], axis=0),
                bounded,
            )
        rows.append(Aggregate(encoder, iqm, mean, _estimate(rank_E[i], rank_RE[:, i], varies)))
    return Aggregates(tuple(rows), tuple(tasks), tuple(scaled), tuple(left_out))


@dataclass(frozen=True)
class Pair:
    """Two encoders over the tasks that both have."""

    a: str
    b: str
    tasks: int
    better: int  # tasks on which a's mean is the better one, by however little
    worse: int
    difference: float  # mean over tasks of a's normalised score less b's; NaN: no task has anchors
    tested: int  # tasks with anchors, which the difference and p are over
    p: float  # Wilcoxon's signed-rank test over tasks, on normalised differences
    p_holm: float  # corrected for all pairs of encoders
    improvement: Estimate  # that a run of a beats one of b, mean over tasks


@dataclass(frozen=True)
class TaskPair:
    """Two encoders on one task, over the seeds that both have."""

    task: Task
    a: str
    b: str
    seeds: int
    difference: float  # mean of a's score less b's, in the metric's units
    p: float  # paired t test; NaN: too few seeds, or none vary
    p_holm: float  # corrected for all tasks and pairs


def pairs(board: Leaderboard) -> list[Pair]:
    """Every two encoders, in the order of the table."""
    found = []
    for a, b in itertools.combinations(board.encoders, 2):
        tasks = [t for t in board.tasks if board.values(t.name, a) and board.values(t.name, b)]
        if not tasks:
            continue
        means = [
            _gain(t, float(np.mean(board.values(t.name, a))) - float(np.mean(board.values(t.name, b)))) for t in tasks
        ]
        scaled = [_span(t, gain) for t, gain in zip(tasks, means, strict=True) if anchors(t) is not None]
        found.append(
            Pair(
                a,
                b,
                len(tasks),
                sum(gain > 0 for gain in means),
                sum(gain < 0 for gain in means),
                float(np.mean(scaled)) if scaled else math.nan,
                len(scaled),
                signed_rank(scaled),
                math.nan,
                _improvement(board, tasks, a, b),
            )
        )
    return _corrected(found)


def task_pairs(board: Leaderboard) -> list[TaskPair]:
    """Every two encoders on every task, where they share a seed; a closed form's score stands for every seed."""
    found = []
    for task in board.tasks:
        for a, b in itertools.combinations(board.encoders, 2):
            x, y = ({s.seed: s.test for s in board.cell(task.name, e)} for e in (a, b))
            if x and y and board.fixed(task.name, a):
                x = dict.fromkeys(y, *x.values())
            elif x and y and board.fixed(task.name, b):
                y = dict.fromkeys(x, *y.values())
            differences = [x[seed] - y[seed] for seed in x if seed in y]
            if differences:
                mean = math.fsum(differences) / len(differences)
                found.append(TaskPair(task, a, b, len(differences), mean, paired_t(differences), math.nan))
    return _corrected(found)


def _corrected(found: list) -> list:
    import dataclasses

    corrected = holm([pair.p for pair in found])
    return [dataclasses.replace(pair, p_holm=p) for pair, p in zip(found, corrected, strict=True)]


def _gain(task: Task, difference: float) -> float:
    return difference if task.higher_is_better else -difference


def _span(task: Task, gain: float) -> float:
    ends = anchors(task)
    assert ends is not None
    return gain / abs(ends[1] - ends[0])


def _improvement(board: Leaderboard, tasks: list[Task], a: str, b: str) -> Estimate:
    def mean(of: Callable[[Task, str], np.ndarray]) -> np.ndarray:
        values = [improvement(*((of(t, e) if t.higher_is_better else -of(t, e)) for e in (a, b))) for t in tasks]
        return np.mean(values, axis=0)

    varies = all(board.varies(t.name, e) for t in tasks for e in (a, b))
    value = mean(lambda task, encoder: np.array(board.values(task.name, encoder)))
    return _estimate(value, mean(lambda task, encoder: board.replicas[task.name, encoder]) if varies else None, varies)


def _estimate(value: np.ndarray | float, replicas_R: np.ndarray | None, varies: bool) -> Estimate:
    if not varies or replicas_R is None:
        return Estimate(float(value))
    return Estimate(float(value), *interval(replicas_R))
