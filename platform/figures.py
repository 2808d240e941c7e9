"""A leaderboard's figures as PNG: a panel a task, the aggregates, validation curves, ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from copernicus.datasets.bench.task import Task
from copernicus.platform.comparison import aggregate
from copernicus.platform.leaderboard import Leaderboard, colour, mean_curve
from copernicus.platform.statistics import Estimate
from copernicus.platform.tables import task_ranks

DPI = 130
RANKS = LinearSegmentedColormap.from_list("ranks", ["#4f8fc0", "#f1f6fa"])


def draw_panels(board: Leaderboard, path: Path) -> Path:
    """One panel a task: each encoder's mean with its 95 % interval, and every seed as a dot."""
    figure, axes = _grid(board.tasks)
    for axis, task in zip(axes, board.tasks, strict=False):
        for x, encoder in enumerate(board.encoders):
            values, s = board.values(task.name, encoder), board.summary(task.name, encoder)
            if s is None:
                said = board.status(task.name, encoder).partition(":")[0]
                axis.text(x, 0.5, said, transform=axis.get_xaxis_transform(), ha="center", va="center", rotation=90,
                          color="firebrick", fontsize=8)  # fmt: skip
                continue
            if s.n > 1:
                axis.plot([x, x], [s.low, s.high], lw=2, color=colour(x))
            axis.plot([x - 0.28, x + 0.28], [s.mean, s.mean], lw=3, color=colour(x), solid_capstyle="butt")
            spread = [x + 0.4 * (i / (s.n - 1) - 0.5) if s.n > 1 else x for i in range(s.n)]
            axis.plot(spread, values, "o", ms=5, color=colour(x), alpha=0.55, mec="white", mew=0.5)
        _title(axis, task)
        axis.set_xticks(range(len(board.encoders)), [str(i + 1) for i in range(len(board.encoders))])
        axis.set_xlim(-0.6, len(board.encoders) - 0.4)
        axis.grid(axis="y", alpha=0.3)
    handles = [Line2D([], [], lw=3, color=colour(i)) for i in range(len(board.encoders))]
    _legend(figure, handles, [f"{i}  {encoder}" for i, encoder in enumerate(board.encoders, start=1)])
    figure.suptitle("Test split: mean, 95 % bootstrap interval, each seed", fontsize=10)
    return _save(figure, path)


def draw_curves(board: Leaderboard, path: Path) -> Path | None:
    """Validation metric by epoch of every cell's best setting: each seed, and their mean. None: no curve is known."""
    tasks = [t for t in board.tasks if any(s.curve for e in board.encoders for s in board.cell(t.name, e))]
    if not tasks:
        return None
    figure, axes = _grid(tasks)
    for axis, task in zip(axes, tasks, strict=False):
        for x, encoder in enumerate(board.encoders):
            for s in board.cell(task.name, encoder):
                axis.plot(range(1, len(s.curve) + 1), s.curve, lw=0.7, alpha=0.4, color=colour(x))
            if (mean := mean_curve(board, task, encoder)) is not None:
                axis.plot(range(1, len(mean) + 1), mean, lw=1.8, color=colour(x), label=encoder)
        _title(axis, task)
        axis.set_xlabel("epoch", fontsize=8)
        axis.grid(alpha=0.3)
    handles: dict[str, Any] = {}
    for axis in axes[: len(tasks)]:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    _legend(figure, list(handles.values()), list(handles))
    figure.suptitle("Validation split: best setting, each seed and their mean", fontsize=10)
    return _save(figure, path)


def draw_aggregates(board: Leaderboard, path: Path) -> Path | None:
    """Interquartile mean, mean normalised score and mean rank with intervals. None: nothing is aggregated."""
    found = aggregate(board)
    if not found.rows:
        return None
    columns: list[tuple[str, list[Estimate]]] = [("mean rank (1 is best)", [row.rank for row in found.rows])]
    if found.normalised:
        columns.insert(0, ("normalised score, mean", [row.mean for row in found.rows if row.mean]))
        columns.insert(0, ("normalised score, interquartile mean", [row.iqm for row in found.rows if row.iqm]))
    figure = Figure(figsize=(1.6 + 3.1 * len(columns), 1.3 + 0.42 * len(found.rows)), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(1, len(columns), squeeze=False, sharey=True)[0]
    for axis, (name, estimates) in zip(axes, columns, strict=True):
        for y, (row, estimate) in enumerate(zip(found.rows, estimates, strict=True)):
            shade = colour(board.encoders.index(row.encoder))
            if not math.isnan(estimate.low):
                axis.plot([estimate.low, estimate.high], [y, y], lw=6, alpha=0.35, color=shade, solid_capstyle="butt")
            axis.plot(estimate.value, y, "o", ms=6, color=shade)
        axis.set_title(name, fontsize=9)
        axis.set_yticks(range(len(found.rows)), [_plain(row.encoder) for row in found.rows], fontsize=8)
        axis.set_ylim(len(found.rows) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    count = len(found.tasks)
    figure.suptitle(
        f"Over {count} task{'s' if count > 1 else ''}, with 95 % bootstrap intervals over seeds", fontsize=10
    )
    return _save(figure, path)


def draw_ranks(board: Leaderboard, path: Path) -> Path:
    """Ranks of encoders on tasks as a heat map; what has no score is blank."""
    table_TE = np.full((len(board.tasks), len(board.encoders)), np.nan)
    for i, task in enumerate(board.tasks):
        for encoder, rank in task_ranks(board, task).items():
            table_TE[i, board.encoders.index(encoder)] = rank
    width, height = 2.2 + 0.85 * len(board.encoders), 1.5 + 0.33 * len(board.tasks)
    figure = Figure(figsize=(max(width, 4.0), height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    axis: Any = figure.subplots()
    worst = max(len(board.encoders), 2)
    axis.imshow(np.ma.masked_invalid(table_TE), cmap=RANKS, vmin=1, vmax=worst, aspect="auto")
    for (i, j), rank in np.ndenumerate(table_TE):
        known = not math.isnan(rank)
        shade = "black" if known else "firebrick"
        said = f"{rank:g}" if known else board.status(board.tasks[i].name, board.encoders[j]).partition(":")[0]
        axis.text(j, i, said, ha="center", va="center", color=shade, fontsize=8 if known else 6)
    axis.set_xticks(
        range(len(board.encoders)), [_plain(e) for e in board.encoders], fontsize=8, rotation=30, ha="right"
    )
    axis.set_yticks(range(len(board.tasks)), [t.title for t in board.tasks], fontsize=8)
    axis.spines[:].set_visible(False)
    axis.tick_params(length=0)
    axis.set_title("Rank of the mean test score (1 is best)", fontsize=10)
    return _save(figure, path)


def _grid(tasks: list[Task]) -> tuple[Figure, Any]:
    columns = min(4, len(tasks))
    height = -(-len(tasks) // columns)
    figure = Figure(figsize=(1.2 + 2.9 * columns, 0.7 + 2.9 * height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    axes: Any = figure.subplots(height, columns, squeeze=False).reshape(-1)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
    for axis in axes[len(tasks) :]:
        axis.set_visible(False)
    return figure, axes


def _legend(figure: Figure, handles: list[Any], names: list[str]) -> None:
    columns = max(1, min(4, 110 // max(map(len, names), default=1)))
    figure.legend(
        handles, [_plain(n) for n in names], loc="outside lower center", ncols=columns, fontsize=8, frameon=False
    )


def _title(axis: Any, task: Task) -> None:
    axis.set_title(
        f"{task.title}: {task.metric} ({'higher' if task.higher_is_better else 'lower'} is better)", fontsize=9
    )


def _plain(name: str) -> str:
    """A name as it is written: a dollar sign would start mathematics."""
    return name.replace("$", r"\$")


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    figure.savefig(part, format="png", dpi=DPI)
    part.replace(path)
    return path
