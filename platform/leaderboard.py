"""Statistics over seeds, and the table of them: for the terminal, as Markdown and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copernicus.datasets.bench import TASKS
from copernicus.datasets.bench.task import Task

if TYPE_CHECKING:
    from rich.table import Table

PUBLISHED = (("copernicus_fm_vit_b16", "published, Copernicus-FM"), ("random_vit_b16", "published, random"))


@dataclass(frozen=True)
class Score:
    """One final run: the best setting of a cell, repeated with one seed."""

    task: str
    encoder: str
    seed: int
    test: float  # the task's metric over the whole test split
    val: float
    settings: dict[str, float] = field(default_factory=dict, hash=False)
    run_id: str = ""


@dataclass(frozen=True)
class Summary:
    """Mean, sample standard deviation (n - 1) and the half-width of a 95 % confidence interval of the mean."""

    n: int
    mean: float
    std: float
    ci95: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.std:.2f}"


def summarise(values: Sequence[float]) -> Summary:
    """Student's t interval; with one value the deviation and the interval are unknown (NaN)."""
    from scipy.stats import t

    n = len(values)
    if n == 0:
        raise ValueError("no values to summarise")
    mean = math.fsum(values) / n
    if n == 1:
        return Summary(1, mean, math.nan, math.nan)
    std = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Summary(n, mean, std, float(t.ppf(0.975, n - 1)) * std / math.sqrt(n))


@dataclass(frozen=True)
class Leaderboard:
    """Scores by task and encoder. The encoders keep the order in which they were first seen."""

    scores: tuple[Score, ...]

    @property
    def tasks(self) -> list[Task]:
        return [TASKS[name] for name in dict.fromkeys(s.task for s in self.scores)]

    @property
    def encoders(self) -> list[str]:
        return list(dict.fromkeys(s.encoder for s in self.scores))

    def summary(self, task: str, encoder: str) -> Summary | None:
        values = [s.test for s in self.scores if s.task == task and s.encoder == encoder]
        return summarise(values) if values else None

    def best(self, task: Task) -> str | None:
        """The encoder with the best mean, where its lead over every other exceeds both deviations; else None."""
        found = {e: s for e in self.encoders if (s := self.summary(task.name, e)) is not None}
        if not found:
            return None
        sign = 1 if task.higher_is_better else -1
        first = max(found, key=lambda e: sign * found[e].mean)
        for encoder, other in found.items():
            # NaN deviations (one seed) never separate anything.
            separated = sign * (found[first].mean - other.mean) > max(found[first].std, other.std)
            if encoder != first and not (separated and found[first].n > 1 and other.n > 1):
                return None
        return first

    def wins(self, encoder: str, over: str) -> int:
        """On how many tasks ``encoder`` beats ``over`` by more than the larger of their deviations over seeds."""
        count = 0
        for task in self.tasks:
            a, b = self.summary(task.name, encoder), self.summary(task.name, over)
            if a and b and a.n > 1 and b.n > 1:
                lead = (a.mean - b.mean) * (1 if task.higher_is_better else -1)
                count += lead > max(a.std, b.std)
        return count

    def rows(self) -> list[list[str]]:
        rows = []
        for task in self.tasks:
            best = self.best(task)
            arrow = "↑" if task.higher_is_better else "↓"
            row = [task.title, f"{task.metric} {arrow}"]
            for encoder in self.encoders:
                s = self.summary(task.name, encoder)
                row.append(
                    "failed" if s is None else f"{s}{' *' if encoder == best and len(self.encoders) > 1 else ''}"
                )
            for key, _ in PUBLISHED:
                figure = task.published.get(key)
                row.append("-" if figure is None else f"{figure[0]:.1f} ± {figure[1]:.1f}")
            rows.append(row)
        return rows

    @property
    def header(self) -> list[str]:
        return ["task", "metric", *self.encoders, *(title for _, title in PUBLISHED)]

    @property
    def caption(self) -> str:
        counts = sorted({s.n for t in self.tasks for e in self.encoders if (s := self.summary(t.name, e))})
        seeds = "-".join(map(str, counts[:1] + counts[-1:] if len(counts) > 1 else counts))
        return (
            f"Test split, mean ± standard deviation over {seeds} seeds. * leads every other encoder by more than either "
            "deviation. Published figures (arXiv 2503.11849) are of the full benchmark and the base model."
        )

    def markdown(self) -> str:
        lines = ["| " + " | ".join(self.header) + " |", "|" + "---|" * len(self.header)]
        lines += ["| " + " | ".join(row) + " |" for row in self.rows()]
        return "\n".join(lines) + f"\n\n{self.caption}\n"

    def table(self) -> Table:
        from rich.table import Table

        table = Table(title="Leaderboard", caption=self.caption, caption_justify="left", title_justify="left")
        for i, name in enumerate(self.header):
            table.add_column(name, justify="left" if i < 2 else "right", style="dim" if "published" in name else "")
        for row in self.rows():
            table.add_row(*(f"[bold green]{cell}[/]" if cell.endswith("*") else cell for cell in row))
        return table

    def picture(self, path: Path) -> Path:
        """One panel a task: each encoder's mean with its 95 % interval, and every seed as a dot."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        tasks, encoders = self.tasks, self.encoders
        columns = min(4, len(tasks))
        height = -(-len(tasks) // columns)
        figure = Figure(figsize=(1.2 + 2.9 * columns, 0.7 + 2.9 * height), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = figure.subplots(height, columns, squeeze=False).reshape(-1)
        colours = ["#1b6ca8", "#e07a5f", "#3d9970", "#8e6bbf", "#c9a227", "#6b7280"]
        for axis, task in zip(axes, tasks, strict=False):
            for x, encoder in enumerate(encoders):
                values = [s.test for s in self.scores if s.task == task.name and s.encoder == encoder]
                if not values:
                    axis.text(x, 0.5, "failed", transform=axis.get_xaxis_transform(), ha="center", color="firebrick")
                    continue
                s = summarise(values)
                colour = colours[x % len(colours)]
                interval = 0.0 if math.isnan(s.ci95) else s.ci95
                axis.errorbar(x, s.mean, yerr=interval, fmt="_", ms=22, mew=3, capsize=5, color=colour)
                spread = [x + 0.12 * (i - (s.n - 1) / 2) / max(s.n - 1, 1) for i in range(s.n)]
                axis.plot(spread, values, "o", ms=4, color=colour, alpha=0.5, mec="none")
            axis.set_title(
                f"{task.title}: {task.metric} ({'higher' if task.higher_is_better else 'lower'} is better)", fontsize=9
            )
            axis.set_xticks(range(len(encoders)), encoders, fontsize=8)
            axis.set_xlim(-0.6, len(encoders) - 0.4)
            axis.tick_params(axis="y", labelsize=8)
            axis.grid(axis="y", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        for axis in axes[len(tasks) :]:
            axis.set_visible(False)
        figure.suptitle("Test split: mean, 95 % interval, each seed", fontsize=10)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130)
        return path
