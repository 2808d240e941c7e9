"""The leaderboard: final scores beside the plan they come from, so that what is missing shows, and the table of both."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from copernicus.datasets.bench.task import Task
from copernicus.datasets.bench.tasks import get_task
from copernicus.datasets.sensors import InputError
from copernicus.platform.schema import QUICK
from copernicus.platform.statistics import COVERAGE, Summary, resample, summarise

if TYPE_CHECKING:
    from rich.table import Table

PUBLISHED = {
    "copernicus_fm_vit_b16": "Copernicus-FM B/16",
    "random_vit_b16": "random B/16",
    "supervised_vit_s16": "supervised S/16",
    "supervised_vit_b16": "supervised B/16",
    "softcon_vit_b14": "SoftCon B/14",
    "croma_vit_b8": "CROMA B/8",
    "dofa_vit_b16": "DOFA B/16",
}
"""Columns of the published table (arXiv 2503.11849, Table 4) as they are headed here; the first two are the main ones."""
MAIN_PUBLISHED = ("copernicus_fm_vit_b16", "random_vit_b16")
ZERO = "random_vit_b16"

# Told apart with any kind of colour vision (Paul Tol's "bright" and "vibrant" schemes).
COLOURS = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#ccbb44", "#009988", "#cc3311", "#66ccee", "#888888", "#bb5566")

Cell = tuple[str, str]
"""(task, encoder)"""


@dataclass(frozen=True)
class Score:
    """One final run: the best setting of a cell, repeated with one seed."""

    task: str
    encoder: str
    seed: int
    test: float  # the task's metric over the whole test split
    val: float
    settings: dict[str, Any] = field(default_factory=dict, hash=False)
    run_id: str = ""
    protocol: str = "probe"
    batchmean: float | None = None  # the test metric as published: the mean of the batches'
    curve: tuple[float, ...] = ()  # validation metric after each epoch, the first included


def anchors(task: Task) -> tuple[float, float] | None:
    """What the normalised scores 0 and 1 are: the published random encoder's figure and the best published one.

    They belong to the task, not to the table, so that another encoder in it moves nobody's score. None: no such figures.
    """
    figures = [figure[0] for figure in task.published.values() if figure is not None]
    zero = task.published.get(ZERO)
    if zero is None:
        return None
    one = max(figures) if task.higher_is_better else min(figures)
    return None if one == zero[0] else (zero[0], one)


@dataclass(frozen=True)
class Leaderboard:
    """Scores by task and encoder. Tasks and encoders keep the order of the plan, then that in which they were first seen.

    Args:
        planned: the seeds of every cell; empty: all tasks and encoders that have a score, with the seeds that are there.
        failures: why a cell failed.
        notes: what whoever reads the table must know, a sentence each.

    Raises:
        InputError: two scores of one task, encoder and seed, two protocols in one cell, or a task that does not exist.
    """

    scores: tuple[Score, ...]
    planned: Mapping[Cell, tuple[int, ...]] = field(default_factory=dict, hash=False)
    failures: Mapping[Cell, str] = field(default_factory=dict, hash=False)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        seen: dict[tuple[str, str, int], Score] = {}
        for s in self.scores:
            if (s.task, s.encoder, s.seed) in seen:
                raise InputError(
                    f"two scores of {s.encoder} on {s.task} with seed {s.seed}: one table holds one of each"
                )
            seen[s.task, s.encoder, s.seed] = s
        for (task, encoder), scores in self._by_cell.items():
            if len(protocols := {s.protocol for s in scores}) > 1:
                raise InputError(
                    f"{encoder} on {task} has scores of {' and '.join(sorted(protocols))}: name these two encoders"
                )
        assert self.tasks is not None  # looks every task up

    @functools.cached_property
    def _by_cell(self) -> dict[Cell, list[Score]]:
        cells: dict[Cell, list[Score]] = {}
        for s in self.scores:
            cells.setdefault((s.task, s.encoder), []).append(s)
        return {cell: sorted(scores, key=lambda s: s.seed) for cell, scores in cells.items()}

    @functools.cached_property
    def _cells(self) -> dict[Cell, None]:
        return dict.fromkeys([*self.planned, *((s.task, s.encoder) for s in self.scores)])

    @functools.cached_property
    def tasks(self) -> list[Task]:
        return [get_task(name) for name in dict.fromkeys(task for task, _ in self._cells)]

    @functools.cached_property
    def encoders(self) -> list[str]:
        return list(dict.fromkeys(encoder for _, encoder in self._cells))

    def cell(self, task: str, encoder: str) -> list[Score]:
        """The scores of a cell, by seed."""
        return self._by_cell.get((task, encoder), [])

    def values(self, task: str, encoder: str) -> list[float]:
        return [s.test for s in self.cell(task, encoder)]

    def protocol(self, encoder: str) -> str:
        """How the encoder was evaluated (on one task or another, where that differs)."""
        return ", ".join(dict.fromkeys(s.protocol for s in self.scores if s.encoder == encoder))

    def summary(self, task: str, encoder: str) -> Summary | None:
        return self._summaries.get((task, encoder))

    @functools.cached_property
    def _summaries(self) -> dict[Cell, Summary]:
        return {cell: summarise([s.test for s in scores], *cell) for cell, scores in self._by_cell.items()}

    @functools.cached_property
    def replicas(self) -> dict[Cell, np.ndarray]:
        """(R, N) bootstrap draws of each cell's scores: resampling stratified by task and encoder."""
        return {cell: resample([s.test for s in scores], *cell) for cell, scores in self._by_cell.items()}

    def status(self, task: str, encoder: str) -> str:
        """What is missing of a cell: nothing (empty), "missing", "failed: why", "2 of 3 seeds", or "not planned"."""
        n, planned = len(self.cell(task, encoder)), self.planned.get((task, encoder))
        failure = self.failures.get((task, encoder))
        if n == 0:
            if failure is not None:
                return f"failed: {failure}" if failure else "failed"
            return "missing" if planned is not None or not self.planned else "not planned"
        if planned is not None and n < len(planned):
            return f"{n} of {len(planned)} seeds" + (f", failed: {failure}" if failure else "")
        return ""

    def missing(self) -> list[tuple[str, str, str]]:
        """(task, encoder, status) of every planned cell that is not whole."""
        found = [(t.name, e, self.status(t.name, e)) for t in self.tasks for e in self.encoders]
        return [(t, e, s) for t, e, s in found if s not in ("", "not planned")]

    def leads(self, task: Task, a: str, b: str) -> float:
        """By how much a's mean is better than b's, less the larger of both deviations over seeds; NaN: cannot be told."""
        x, y = self.summary(task.name, a), self.summary(task.name, b)
        if x is None or y is None or not (self.varies(task.name, a) and self.varies(task.name, b)):
            return math.nan
        deviation = max(s.std if s.n > 1 else 0.0 for s in (x, y))
        return (x.mean - y.mean) * (1 if task.higher_is_better else -1) - deviation

    def fixed(self, task: str, encoder: str) -> bool:
        """Whether the cell's one score is of a closed form: no seed would have changed it."""
        scores = self.cell(task, encoder)
        return len(scores) == 1 and scores[0].protocol in QUICK

    def varies(self, task: str, encoder: str) -> bool:
        """Whether it is known how the cell's score varies with the seed: of several, or not at all."""
        return len(self.cell(task, encoder)) > 1 or self.fixed(task, encoder)

    def best(self, task: Task) -> str | None:
        """The encoder whose lead over every other that has scores exceeds both deviations; else, or alone, None."""
        found = [e for e in self.encoders if self.summary(task.name, e) is not None]
        for e in found if len(found) > 1 else []:
            if all(self.leads(task, e, other) > 0 for other in found if other != e):
                return e
        return None

    def wins(self, encoder: str, over: str) -> int:
        """On how many tasks ``encoder`` beats ``over`` by more than the larger of their deviations over seeds."""
        return sum(self.leads(task, encoder, over) > 0 for task in self.tasks)

    def settings(self, task: str, encoder: str) -> str:
        """The cell's best setting as text."""
        texts = [", ".join(f"{k}={_number(v)}" for k, v in s.settings.items()) for s in self.cell(task, encoder)]
        return " / ".join(dict.fromkeys(filter(None, texts)))

    def batchmean(self, task: str, encoder: str) -> float | None:
        """Mean over seeds of the metric averaged over batches, as the published figures are; None: not recorded."""
        values = [s.batchmean for s in self.cell(task, encoder)]
        return None if None in values or not values else math.fsum(v for v in values if v is not None) / len(values)

    def text(self, task: Task, encoder: str, starred: str | None, interval: bool = True) -> str:
        """A cell as the tables show it: mean ± deviation, its interval, a star for the best, what is missing."""
        s, status = self.summary(task.name, encoder), self.status(task.name, encoder)
        if s is None:
            return "–" if status == "not planned" else status
        bounds = f" [{s.low:.2f}, {s.high:.2f}]" if interval and s.n > 1 else ""
        star = " *" if encoder == starred else ""
        return f"{s}{bounds}{f' ({status})' if status else ''}{star}"

    @property
    def header(self) -> list[str]:
        return ["task", "metric", *self.encoders, *(f"published, {PUBLISHED[key]}" for key in MAIN_PUBLISHED)]

    def rows(self, interval: bool = True) -> list[list[str]]:
        rows = []
        for task in self.tasks:
            best = self.best(task)
            row = [task.title, f"{task.metric} {'↑' if task.higher_is_better else '↓'}"]
            row += [self.text(task, encoder, best, interval) for encoder in self.encoders]
            row += [published_text(task, key) for key in MAIN_PUBLISHED]
            rows.append(row)
        return rows

    @property
    def caption(self) -> str:
        counts = sorted({s.n for s in self._summaries.values()})
        seeds = "-".join(map(str, counts[:1] + counts[-1:] if len(counts) > 1 else counts))
        closed = ""
        if any(self.fixed(*cell) for cell in self._by_cell):
            closed = f"{', '.join(QUICK)} depend on no seed: one run, without a deviation. "
        return (
            f"Test split, mean ± standard deviation over {seeds or 'no'} seed{'' if counts == [1] else 's'}"
            f"{', [95 % bootstrap interval of the mean]' if counts[-1:] > [1] else ''}. {interval_note(counts)}{closed}"
            "* leads every other encoder by more than either deviation. "
            "Published figures (arXiv 2503.11849) are of the full benchmark and the base model."
        )

    def markdown(self) -> str:
        from copernicus.platform.tables import markdown_table

        return f"{markdown_table(self.header, self.rows(), left=2)}\n{self.caption}\n"

    def table(self) -> Table:
        from copernicus.platform.tables import score_table

        return score_table(self)


def colour(number: int) -> str:
    """The encoder's colour in every picture, by its place in the table."""
    return COLOURS[number % len(COLOURS)]


def mean_curve(board: Leaderboard, task: Task, encoder: str) -> np.ndarray | None:
    """Mean over seeds at each epoch that all of them reached; None: no curve is known."""
    curves = [s.curve for s in board.cell(task.name, encoder) if s.curve]
    if not curves:
        return None
    return np.mean([curve[: min(map(len, curves))] for curve in curves], axis=0)


def interval_note(counts: Sequence[int]) -> str:
    """How little an interval over few seeds means, in words."""
    few = [n for n in counts if 1 < n <= 5]
    if not few:
        return ""
    covered = " and ".join(f"{COVERAGE[n]} % with {n} seeds" for n in few)
    return (
        f"So few seeds give intervals that are too narrow: they hold the mean in {covered}, not in 95 %"
        f"{' (of 2 or 3 seeds they are the range from worst to best)' if few[0] <= 3 else ''}. "
    )


def published_text(task: Task, key: str) -> str:
    figure = task.published.get(key)
    return "–" if figure is None else f"{figure[0]:.1f} ± {figure[1]:.1f}"


def _number(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def join(boards: Mapping[str, Leaderboard]) -> Leaderboard:
    """Several leaderboards as one, by the name of each: encoders of one name in two sweeps are two encoders."""
    if len(boards) == 1:
        return next(iter(boards.values()))
    scores: list[Score] = []
    planned: dict[Cell, tuple[int, ...]] = {}
    failures: dict[Cell, str] = {}
    notes: list[str] = []
    for name, board in boards.items():
        scores += [dataclasses.replace(s, encoder=f"{name}/{s.encoder}") for s in board.scores]
        # A board that does not know its plan still must not have its cells called missing in the others' tasks.
        known = board.planned or {cell: tuple(s.seed for s in found) for cell, found in board._by_cell.items()}
        planned |= {(task, f"{name}/{encoder}"): seeds for (task, encoder), seeds in known.items()}
        failures |= {(task, f"{name}/{encoder}"): why for (task, encoder), why in board.failures.items()}
        notes += [f"{name}: {note}" for note in board.notes]
    return Leaderboard(tuple(scores), planned, failures, tuple(notes))
