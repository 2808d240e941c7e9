"""The leaderboard as one self-contained HTML page: no request leaves it, and nothing in it but its own script runs.

Names of encoders, settings and errors come from a YAML that anybody may have written: every text passes ``escape``, and the
page's content security policy forbids everything else.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from copernicus.datasets.bench.task import Task
from copernicus.datasets.sensors import InputError
from copernicus.platform import report_svg
from copernicus.platform.comparison import Aggregates, Pair, TaskPair, aggregate, pairs, task_pairs
from copernicus.platform.leaderboard import MAIN_PUBLISHED, PUBLISHED, Cell, Leaderboard, colour, published_text
from copernicus.platform.report_style import SCRIPT, STYLE
from copernicus.platform.statistics import Estimate
from copernicus.platform.tables import TASK_PAIR_NOTE, aggregate_note, p_text, pair_note, task_ranks

IMAGES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}
MOST_OPEN = 8  # cells listed at the top without a click


def page(board: Leaderboard, title: str, pictures: Mapping[Cell, Sequence[Path]]) -> str:
    """The page's HTML.

    Args:
        pictures: PNG or JPEG files by (task, encoder); they are embedded.

    Raises:
        InputError: a picture that cannot be read, or is of another kind.
    """
    body = [_head(board, title)]
    several = len(board.encoders) > 1
    if several:
        found = aggregate(board)
        body.append(_aggregates(board, found))
    body.append(_scores(board))
    if several:
        body.append(_ranks(board))
    body.append(_panels(board))
    if several:
        body.append(_pairs(board, pairs(board), task_pairs(board)))
    body += [_settings(board), _pictures(board, pictures), _all_scores(board)]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)} – leaderboard</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(filter(None, body))
        + f"\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def _head(board: Leaderboard, title: str) -> str:
    planned = sum(map(len, board.planned.values()))
    runs = f"{len(board.scores)} of {planned} final runs" if planned else _count(len(board.scores), "final run")
    said = f"Copernicus-Bench · {_count(len(board.tasks), 'task')} × {_count(len(board.encoders), 'encoder')} · {runs}"
    legend = "".join(
        f"<li>{_dot(i)}<span><b>{escape(e)}</b> <span class='small'>{escape(board.protocol(e))}</span></span></li>"
        for i, e in enumerate(board.encoders)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in board.notes)
    shown = f"<ul>{notes}</ul>" if notes else ""
    if missing := board.missing():
        listed = "".join(f"<li>{escape(f'{t} / {e}: {s}')}</li>" for t, e, s in missing)
        opened = " open" if len(missing) <= MOST_OPEN else ""
        summary = f"<summary>{_count(len(missing), 'cell')} not whole</summary>"
        shown = f"<details{opened}>{summary}<ul>{listed}</ul></details>{shown}"
    head = f'<header><h1>{escape(title)}</h1><p class="sub">{said}</p><ul class="legend">{legend}</ul></header>'
    return head + (f'<div class="notes">{shown}</div>' if shown else "")


def _aggregates(board: Leaderboard, found: Aggregates) -> str:
    note = f'<p class="small">{escape(aggregate_note(found))}</p>'
    if not found.rows:
        return f"<section><h2>Over tasks</h2>{note}</section>"
    columns: list[tuple[str, bool, list[Estimate]]] = []
    if found.normalised:
        columns.append(("IQM of normalised scores", True, [r.iqm for r in found.rows if r.iqm]))
        columns.append(("mean normalised score", True, [r.mean for r in found.rows if r.mean]))
    columns.append(("mean rank", False, [r.rank for r in found.rows]))
    axes = []
    for _, higher, estimates in columns:
        bounds = [v for e in estimates for v in (e.value, e.low, e.high) if not math.isnan(v)]
        axes.append(
            report_svg.Axis(bounds, *((8, report_svg.BAR - 8) if higher else (report_svg.BAR - 8, 8)))
        )  # the better end is on the right
    heads = "".join(f"<th>{name} {'↑' if higher else '↓'}</th>" for name, higher, _ in columns)
    rows = []
    for n, row in enumerate(found.rows):
        i = board.encoders.index(row.encoder)
        cells = "".join(
            f'<td data-key="{estimates[n].value!r}"><span class="v">{estimates[n].value:.2f}</span>{_bounds(estimates[n])}'
            f"{report_svg.bar(estimates[n], axis, i)}</td>"
            for (_, _, estimates), axis in zip(columns, axes, strict=True)
        )
        rows.append(f'<tr><th scope="row">{_dot(i)} {escape(row.encoder)}</th>{cells}</tr>')
    foot = "".join(f"<td>{report_svg.scale(axis)}</td>" for axis in axes)
    return (
        '<section><h2>Over tasks</h2><div class="card wide"><table class="over sortable"><thead><tr><th class="t">encoder</th>'
        f"{heads}</tr></thead><tbody>{''.join(rows)}</tbody><tfoot><tr><td></td>{foot}</tr></tfoot></table></div>{note}</section>"
    )


def _scores(board: Leaderboard) -> str:
    encoders = "".join(f'<th class="name">{_dot(i)} {escape(e)}</th>' for i, e in enumerate(board.encoders))
    published = "".join(
        f'<th class="pub{"" if key in MAIN_PUBLISHED else " more"}">published,<br>{escape(name)}</th>'
        for key, name in PUBLISHED.items()
    )
    rows = []
    for task in board.tasks:
        best = board.best(task)
        cells = "".join(_score_cell(board, task, e, e == best) for e in board.encoders)
        for key in PUBLISHED:
            figure = task.published.get(key)
            sort = "" if figure is None else repr(figure[0])
            kind = "pub" if key in MAIN_PUBLISHED else "pub more"
            cells += f'<td class="{kind}" data-key="{sort}">{published_text(task, key)}</td>'
        arrow = "↑" if task.higher_is_better else "↓"
        rows.append(
            f'<tr><th scope="row">{escape(task.title)}</th><td class="t n">{task.metric} {arrow}</td>{cells}</tr>'
        )
    return (
        '<section><h2>Test scores</h2><label class="toggle"><input type="checkbox" id="all-published"> all published columns'
        '</label><div class="card wide"><table id="scores" class="scores sortable"><thead><tr><th class="t">task</th>'
        f'<th class="t">metric</th>{encoders}{published}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
        f'<p class="small">{escape(board.caption.replace("* leads", "Shaded: leads"))}</p></section>'
    )


def _score_cell(board: Leaderboard, task: Task, encoder: str, best: bool) -> str:
    s, status = board.summary(task.name, encoder), board.status(task.name, encoder)
    if s is None:
        return '<td data-key="">–</td>' if status == "not planned" else f'<td data-key="">{_badge(status)}</td>'
    kind = ' class="best"' if best else ""
    interval = _bounds(Estimate(s.mean, s.low, s.high))
    return (
        f'<td{kind} data-key="{s.mean!r}"><span class="v">{s}</span>{interval}{_badge(status) if status else ""}</td>'
    )


def _ranks(board: Leaderboard) -> str:
    worst = len(board.encoders)
    heads = "".join(f'<th class="name">{_dot(i)} {escape(e)}</th>' for i, e in enumerate(board.encoders))
    rows = []
    for task in board.tasks:
        ranked, cells = task_ranks(board, task), ""
        for encoder in board.encoders:
            if encoder in ranked:
                share = 70 * (worst - ranked[encoder]) / (worst - 1) + 4
                shade = f"background:color-mix(in srgb,var(--accent) {share:.0f}%,var(--card))"
                cells += f'<td style="{shade}">{ranked[encoder]:g}</td>'
            else:
                status = board.status(task.name, encoder)
                cells += f"<td>{'–' if status == 'not planned' else _badge(status.partition(':')[0])}</td>"
        rows.append(f'<tr><th scope="row">{escape(task.title)}</th>{cells}</tr>')
    return (
        '<section class="ranks"><h2>Ranks</h2><div class="wide"><table class="card"><thead><tr><th class="t">task</th>'
        f'{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div><p class="small">Rank of the mean test score among '
        "the encoders that have one, 1 is best; ties share the mean of their ranks.</p></section>"
    )


def _panels(board: Leaderboard) -> str:
    panels = "".join(f'<div class="card">{_title(task)}{report_svg.panel(board, task)}</div>' for task in board.tasks)
    return (
        f'<section><h2>Each task</h2><div class="grid-of">{panels}</div><p class="small">Dots are seeds, bars their mean, '
        "upright lines the 95 % bootstrap interval, dashed lines published means (where they lie within). Numbers are those of "
        "the legend above.</p></section>"
    )


def _pairs(board: Leaderboard, over_tasks: Sequence[Pair], by_task: Sequence[TaskPair]) -> str:
    if not over_tasks:
        return ""
    rows = "".join(
        f'<tr><th scope="row">{escape(p.a)} – {escape(p.b)}</th>{_number(p.tasks)}{_number(p.better)}{_number(p.worse)}'
        f"{_number(p.difference, '+.2f')}"
        f'<td data-key="{p.improvement.value!r}"><span class="v">{p.improvement.value:.2f}</span>{_bounds(p.improvement)}</td>'
        f"{_p(p.p)}{_p(p.p_holm)}</tr>"
        for p in over_tasks
    )
    heads = ["tasks", "better on", "worse on", "mean difference", "P(improvement)", "p", "p (Holm)"]
    found = (
        '<section><h2>Paired comparisons</h2><div class="card wide"><table class="sortable"><thead><tr><th class="t">first – '
        f"second</th>{''.join(f'<th>{h}</th>' for h in heads)}</tr></thead><tbody>{rows}</tbody></table></div>"
        f'<p class="small">{escape(pair_note(over_tasks))}</p>'
    )
    if by_task:
        rows = "".join(
            f'<tr><th scope="row">{escape(p.task.title)}</th><td class="t">{escape(p.a)} – {escape(p.b)}</td>'
            f"{_number(p.seeds)}{_number(p.difference, '+.2f')}{_p(p.p)}{_p(p.p_holm)}</tr>"
            for p in by_task
        )
        heads = ["seeds", "difference", "p", "p (Holm)"]
        found += (
            f"<details><summary>On each task, over seeds <small>({len(by_task)} rows)</small></summary>"
            '<div class="card wide"><table class="sortable"><thead><tr><th class="t">task</th><th class="t">first – second</th>'
            f"{''.join(f'<th>{h}</th>' for h in heads)}</tr></thead><tbody>{rows}</tbody></table></div>"
            f'<p class="small">{escape(TASK_PAIR_NOTE)}</p></details>'
        )
    return found + "</section>"


def _settings(board: Leaderboard) -> str:
    charts = "".join(
        f'<div class="card">{_title(task)}{chart}</div>'
        for task in board.tasks
        if (chart := report_svg.curves(board, task))
    )
    rows = []
    for task in board.tasks:
        for i, encoder in enumerate(board.encoders):
            s, scores = board.summary(task.name, encoder), board.cell(task.name, encoder)
            if s is None:
                continue
            batchmean = board.batchmean(task.name, encoder)
            rows.append(
                f'<tr><th scope="row">{escape(task.title)}</th><td class="t">{_dot(i)} {escape(encoder)}</td>'
                f'<td class="t">{escape(scores[0].protocol)}</td>'
                f'<td class="t"><code>{escape(board.settings(task.name, encoder) or "defaults")}</code></td>{_number(s.n)}'
                f"{_number(float(np.mean([x.val for x in scores])), '.2f')}{_number(s.mean, '.2f')}"
                f"{_number(math.nan if batchmean is None else batchmean, '.2f')}</tr>"
            )
    if not rows:
        return ""
    drawn = (
        f'<div class="grid-of">{charts}</div><p class="small">Validation metric by epoch: each seed, and bold their mean.</p>'
        if charts
        else ""
    )
    return (
        f"<section><h2>Best settings</h2>{drawn}<details{'' if charts else ' open'}><summary>Settings <small>({len(rows)} cells)"
        '</small></summary><div class="card wide"><table class="sortable"><thead><tr><th class="t">task</th>'
        '<th class="t">encoder</th><th class="t">protocol</th><th class="t">setting</th><th>seeds</th><th>validation</th>'
        f"<th>test</th><th>test, mean of batches</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="small">Chosen on the validation split in a search with a seed of its own. The published figures are means '
        "of batches; the test scores above are over the whole split.</p></details></section>"
    )


def _pictures(board: Leaderboard, pictures: Mapping[Cell, Sequence[Path]]) -> str:
    titles = {task.name: task.title for task in board.tasks}
    figures = "".join(
        f'<figure class="card"><img alt="{escape(path.stem)}" src="{_embedded(path)}"><figcaption>'
        f"{escape(titles.get(task, task))} · {escape(encoder)} · {escape(path.stem)}</figcaption></figure>"
        for (task, encoder), paths in pictures.items()
        for path in paths
    )
    return f'<section><h2>Pictures</h2><div class="pictures">{figures}</div></section>' if figures else ""


def _embedded(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"picture {path} cannot be read: {error.strerror or error}") from None
    for magic, kind in IMAGES.items():
        if data.startswith(magic):
            return f"data:{kind};base64,{base64.b64encode(data).decode()}"
    raise InputError(f"picture {path} is neither PNG nor JPEG")


def _all_scores(board: Leaderboard) -> str:
    titles = {task.name: task.title for task in board.tasks}
    rows = "".join(
        f'<tr><th scope="row">{escape(titles[s.task])}</th><td class="t">{escape(s.encoder)}</td>{_number(s.seed)}'
        f"{_number(s.val, '.3f')}{_number(s.test, '.3f')}"
        f'{_number(math.nan if s.batchmean is None else s.batchmean, ".3f")}<td class="t"><code>{escape(s.run_id)}</code></td></tr>'
        for s in board.scores
    )
    return (
        f"<section><h2>Every run</h2><details><summary>Scores by seed <small>({len(board.scores)} runs)</small></summary>"
        '<div class="card wide"><table class="sortable"><thead><tr><th class="t">task</th><th class="t">encoder</th>'
        "<th>seed</th><th>validation</th><th>test</th><th>test, mean of batches</th>"
        f'<th class="t">MLflow run</th></tr></thead><tbody>{rows}</tbody></table></div></details></section>'
    )


def _title(task: Task) -> str:
    better = "higher" if task.higher_is_better else "lower"
    return f"<h3>{escape(task.title)} <small>{task.metric}, {better} is better</small></h3>"


def _dot(number: int) -> str:
    return f'<span class="dot" style="background:{colour(number)}">{number + 1}</span>'


def _badge(status: str) -> str:
    return f'<span class="badge">{escape(status)}</span>'


def _bounds(estimate: Estimate) -> str:
    if math.isnan(estimate.low):
        return ""
    return f'<span class="ci">[{estimate.low:.2f}, {estimate.high:.2f}]</span>'


def _number(value: float, form: str = "") -> str:
    return '<td data-key="">–</td>' if math.isnan(value) else f'<td data-key="{value!r}">{value:{form}}</td>'


def _p(value: float) -> str:
    return f'<td class="n" data-key="{"" if math.isnan(value) else repr(value)}">{escape(p_text(value))}</td>'


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
