"""A leaderboard's tables as text: for the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from copernicus.datasets.bench.task import Task
from copernicus.platform.comparison import Aggregates, Pair, TaskPair, aggregate, normalise, pairs, task_pairs
from copernicus.platform.leaderboard import MAIN_PUBLISHED, PUBLISHED, Leaderboard, anchors, published_text
from copernicus.platform.statistics import Estimate, ranks

AGGREGATE_HEADER = ["encoder", "protocol", "IQM ↑", "mean normalised ↑", "mean rank ↓"]
PAIR_HEADER = ["pair", "tasks", "better on", "worse on", "mean difference", "P(improvement)", "p", "p (Holm)"]
TASK_PAIR_HEADER = ["task", "pair", "seeds", "difference", "p", "p (Holm)"]
MOST_SAID = 12


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table whose first ``left`` columns are text, the others numbers."""
    lines = [header, *rows]
    text = ["| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines]
    rule = "|" + "---|" * left + "---:|" * (len(header) - left)
    return "\n".join([text[0], rule, *text[1:]]) + "\n"


def _cell(text: str) -> str:
    for character in "\\|<`":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


def score_table(board: Leaderboard) -> Table:
    """Means, deviations and below them the intervals; the best of a task in green."""
    table = Table(
        title="Leaderboard",
        caption=escape(board.caption),
        caption_justify="left",
        title_justify="left",
        show_lines=False,
    )
    for i, name in enumerate(board.header):
        table.add_column(
            escape(name), justify="left" if i < 2 else "right", style="dim" if i >= 2 + len(board.encoders) else ""
        )
    for task in board.tasks:
        best = board.best(task)
        cells = [_two_lines(board, task, encoder, best) for encoder in board.encoders]
        table.add_row(
            task.title,
            f"{task.metric} {'↑' if task.higher_is_better else '↓'}",
            *cells,
            *(published_text(task, key) for key in MAIN_PUBLISHED),
        )
    return table


def _two_lines(board: Leaderboard, task: Task, encoder: str, best: str | None) -> Text:
    s = board.summary(task.name, encoder)
    said = board.text(task, encoder, best, interval=False)
    if s is None:
        said = said.partition(":")[0]  # why it failed is said below the table
    text = Text(said, style="bold green" if encoder == best else "" if s else "red")
    if s is not None and s.n > 1:
        text.append(f"\n{s.low:.2f} – {s.high:.2f}", style="not bold dim")
    return text


def aggregate_rows(found: Aggregates, board: Leaderboard) -> list[list[str]]:
    return [
        [row.encoder, board.protocol(row.encoder), _said(row.iqm), _said(row.mean), str(row.rank)] for row in found.rows
    ]


def pair_rows(found: Sequence[Pair]) -> list[list[str]]:
    return [
        [
            f"{p.a} – {p.b}", str(p.tasks), str(p.better), str(p.worse), _signed(p.difference), str(p.improvement),
            p_text(p.p), p_text(p.p_holm),
        ]
        for p in found
    ]  # fmt: skip


def task_pair_rows(found: Sequence[TaskPair]) -> list[list[str]]:
    return [
        [p.task.title, f"{p.a} – {p.b}", str(p.seeds), _signed(p.difference), p_text(p.p), p_text(p.p_holm)]
        for p in found
    ]


def aggregate_note(found: Aggregates) -> str:
    """What the aggregates are over, and what they left out."""
    if not found.tasks:
        return " ".join(["No aggregate: no task has scores of all encoders.", *(f"{line}." for line in found.left_out)])
    count = len(found.tasks)
    said = f"Over the {count} task{'s' if count > 1 else ''} that all compared encoders have. "
    if found.normalised:
        said += (
            "Normalised scores: 0 is a task's published random encoder, 1 its best published figure, so another encoder in the "
            "table moves nobody's score; on data other than the published benchmark they order encoders and mean nothing more. "
            "IQM: mean of the middle half of runs x tasks. "
        )
    bounded = not math.isnan(found.rows[0].rank.low)
    said += (
        "Intervals: 95 %, runs resampled within each task."
        if bounded
        else "No interval of ranks: cells with a single seed."
    )
    return " ".join([said, *(f"{line}." for line in found.left_out)])


def pair_note(found: Sequence[Pair]) -> str:
    """What the test over tasks can and cannot show."""
    if not found:
        return ""
    tasks = max(p.tested for p in found)
    least = 2.0 ** (1 - tasks)
    said = (
        "First less second, over tasks: mean difference of normalised scores; P(improvement): that a run of the first beats "
        "one of the second, mean over tasks; p: Wilcoxon's signed-rank test, two-sided, exact; Holm: corrected for all pairs."
    )
    if not tasks:
        return f"{said} No task has published figures to normalise by, hence no difference and no p."
    return f"{said} With {tasks} task{'s' if tasks > 1 else ''} no p can be below {least:.2g}." + (
        " That is too few for any difference to be significant at 0.05." if least > 0.05 else ""
    )


TASK_PAIR_NOTE = (
    "First less second, over the seeds that both have, in the metric's units; p: paired t test, two-sided; Holm: corrected for "
    "all rows. A dash: too few seeds, or scores that do not vary. A closed form's one score stands for every seed. Seeds vary heads, orders and flips, not pretraining or data."
)


def aggregate_table(board: Leaderboard) -> Table:
    found = aggregate(board)
    table = Table(
        title="Over tasks", caption=escape(aggregate_note(found)), caption_justify="left", title_justify="left"
    )
    for i, name in enumerate(AGGREGATE_HEADER):
        table.add_column(name, justify="left" if i < 2 else "right")
    for row in aggregate_rows(found, board):
        table.add_row(*map(escape, row))
    return table


def terminal(board: Leaderboard) -> list[Any]:
    """What a terminal shows: the table, the aggregates where there is something to compare, what is missing, notes."""
    shown: list[Any] = [board.table()]
    if len(board.encoders) > 1 and len(board.tasks) > 1:
        found = pairs(board)
        shown.append(aggregate_table(board))
        for p in found[:MOST_SAID]:
            said = p_text(p.p_holm)
            sure = "" if math.isnan(p.p_holm) else f", p {said if '<' in said else f'= {said}'} (Wilcoxon, Holm)"
            shown.append(
                Text(f"{p.a} is better than {p.b} on {p.better} of {p.tasks} tasks, worse on {p.worse}{sure}.")
            )
        if len(found) > MOST_SAID:
            shown.append(Text(f"... and {len(found) - MOST_SAID} pairs more: see leaderboard.md"))
    for task, encoder, status in board.missing()[:MOST_SAID]:
        shown.append(Text(f"{task} / {encoder}: {status}", style="yellow"))
    if len(board.missing()) > MOST_SAID:
        shown.append(Text(f"... and {len(board.missing()) - MOST_SAID} cells more that are not whole", style="yellow"))
    shown += [Text(f"note: {note}", style="yellow") for note in board.notes]
    return shown


def document(board: Leaderboard) -> str:
    """The whole leaderboard as Markdown."""
    parts = ["# Leaderboard\n", *(f"> {_cell(note)}\n" for note in board.notes), board.markdown()]
    if missing := board.missing():
        parts += ["## Missing\n", "".join(f"- {_cell(f'{t} / {e}: {s}')}\n" for t, e, s in missing)]
    if len(board.encoders) > 1:
        found = aggregate(board)
        compared, by_task = pairs(board), task_pairs(board)
        parts += ["## Over tasks\n", markdown_table(AGGREGATE_HEADER, aggregate_rows(found, board), left=2)]
        parts += [f"{_cell(aggregate_note(found))}\n"]
        if compared:
            parts += [
                "## Paired tests over tasks\n",
                markdown_table(PAIR_HEADER, pair_rows(compared)),
                pair_note(compared) + "\n",
            ]
        if by_task:
            parts += [
                "## Paired tests on each task\n",
                markdown_table(TASK_PAIR_HEADER, task_pair_rows(by_task), left=2),
            ]
            parts += [TASK_PAIR_NOTE + "\n"]
    parts += [
        "## Best settings\n",
        markdown_table(["task", "encoder", "protocol", "settings", "validation"], _settings(board), 4),
    ]
    published = [[t.title, t.metric, *(published_text(t, key) for key in PUBLISHED)] for t in board.tasks]
    parts += ["## Published\n", markdown_table(["task", "metric", *PUBLISHED.values()], published, left=2)]
    return "\n".join(parts)


def _settings(board: Leaderboard) -> list[list[str]]:
    rows = []
    for task in board.tasks:
        for encoder in board.encoders:
            if scores := board.cell(task.name, encoder):
                val = float(np.mean([s.val for s in scores]))
                settings = board.settings(task.name, encoder) or "defaults"
                rows.append([task.title, encoder, scores[0].protocol, settings, f"{val:.2f}"])
    return rows


def score_csv(board: Leaderboard) -> str:
    """One row a task and encoder, those without a score too. Figures are in the metric's units; empty: unknown."""
    columns = [
        "task", "title", "metric", "higher_is_better", "encoder", "protocol", "n", "planned", "status", "mean", "std",
        "ci_low", "ci_high", "t_low", "t_high", "batchmean", "val_mean", "normalised", "rank", "settings", "run_ids",
    ]  # fmt: skip
    columns += [name for key in PUBLISHED for name in (f"published_{key}", f"published_{key}_std")]
    rows = []
    for task in board.tasks:
        rank = task_ranks(board, task)
        for encoder in board.encoders:
            s, scores = board.summary(task.name, encoder), board.cell(task.name, encoder)
            planned = board.planned.get((task.name, encoder))
            row: dict[str, Any] = {
                "task": task.name, "title": task.title, "metric": task.metric, "encoder": encoder, "n": len(scores),
                "higher_is_better": task.higher_is_better, "planned": "" if planned is None else len(planned),
                "status": board.status(task.name, encoder),
            }  # fmt: skip
            if s is not None:
                row |= {
                    "protocol": scores[0].protocol, "mean": s.mean, "std": s.std, "ci_low": s.low, "ci_high": s.high,
                    "t_low": s.mean - s.ci95, "t_high": s.mean + s.ci95, "batchmean": board.batchmean(task.name, encoder),
                    "val_mean": float(np.mean([x.val for x in scores])), "rank": rank[encoder],
                    "settings": json.dumps(scores[0].settings), "run_ids": " ".join(x.run_id for x in scores),
                }  # fmt: skip
                if anchors(task) is not None:
                    row["normalised"] = float(normalise(task, np.array(s.mean)))
            for key in PUBLISHED:
                mean, std = task.published.get(key) or (None, None)
                row |= {f"published_{key}": mean, f"published_{key}_std": std}
            rows.append(row)
    return _csv(columns, rows)


def pair_csv(board: Leaderboard) -> str:
    """The paired tests: a row a pair over tasks (``task`` is empty), then a row a task and pair over seeds."""
    columns = [
        "task", "a", "b", "n", "better", "worse", "difference", "improvement", "improvement_low", "improvement_high",
        "test", "p", "p_holm",
    ]  # fmt: skip
    rows: list[dict[str, Any]] = [
        {
            "a": p.a, "b": p.b, "n": p.tasks, "better": p.better, "worse": p.worse, "difference": p.difference,
            "improvement": p.improvement.value, "improvement_low": p.improvement.low, "improvement_high": p.improvement.high,
            "test": "wilcoxon over tasks", "p": p.p, "p_holm": p.p_holm,
        }
        for p in pairs(board)
    ]  # fmt: skip
    rows += [
        {"task": p.task.name, "a": p.a, "b": p.b, "n": p.seeds, "difference": p.difference, "test": "paired t over seeds",
         "p": p.p, "p_holm": p.p_holm}
        for p in task_pairs(board)
    ]  # fmt: skip
    return _csv(columns, rows)


def task_ranks(board: Leaderboard, task: Task) -> dict[str, float]:
    """Ranks on one task among the encoders that have a score there."""
    found = {e: s.mean for e in board.encoders if (s := board.summary(task.name, e)) is not None}
    sign = 1 if task.higher_is_better else -1
    return (
        dict(zip(found, map(float, ranks(np.array([sign * m for m in found.values()]))), strict=True)) if found else {}
    )


def p_text(p: float) -> str:
    return "–" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _csv(columns: list[str], rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()})
    return text.getvalue()


def _said(estimate: Estimate | None) -> str:
    return "–" if estimate is None else str(estimate)


def _signed(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:+.2f}"
