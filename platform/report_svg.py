"""Small charts as inline SVG, for a page that must need nothing else and follow its theme: text and lines take their colour
from the page's style sheet. Every text that comes from outside is escaped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from copernicus.datasets.bench.task import Task
from copernicus.platform.leaderboard import Leaderboard, colour, mean_curve
from copernicus.platform.statistics import Estimate

WIDTH, HEIGHT = 264, 172
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 8, 22
BAR = 240


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from ``low`` to ``high``, at most ``most``."""
    assert high > low
    step = 10.0 ** math.floor(math.log10((high - low) / most))
    for factor in (1, 2, 5, 10, 20):
        first, last = math.ceil(low / (factor * step) - 1e-9), math.floor(high / (factor * step) + 1e-9)
        if last - first < most:
            return [i * factor * step for i in range(first, last + 1)]
    raise AssertionError((low, high, most))


class Axis:
    """Maps values to pixels; pixel ``start`` is the lower end of the range, with some room on either side."""

    def __init__(self, values: Sequence[float], start: float, stop: float):
        low, high = min(values), max(values)
        room = 0.07 * (high - low) or 0.02 * abs(high) or 1.0
        self.low, self.high, self.start, self.stop = low - room, high + room, start, stop

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.stop - self.start)


def label(value: float) -> str:
    return f"{value:.10g}"


def panel(board: Leaderboard, task: Task) -> str:
    """One task: each encoder's seeds as dots, its mean as a bar, its interval as a line; published means, where they lie
    within, as dashed lines."""
    found = [(i, e, s) for i, e in enumerate(board.encoders) if (s := board.summary(task.name, e)) is not None]
    if not found:
        return '<p class="empty">no score yet</p>'
    values = [v for _, e, s in found for v in (*board.values(task.name, e), *(() if s.n == 1 else (s.low, s.high)))]
    y = Axis(values, HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / len(board.encoders)
    lines, names = [], []
    for key, said in (("copernicus_fm_vit_b16", "Copernicus-FM"), ("random_vit_b16", "random")):
        figure = task.published.get(key)
        if figure is not None and y.low <= figure[0] <= y.high:
            at = y(figure[0])
            above = at - 3 if at > TOP + 10 else at + 9
            lines.append(f'<line class="pub" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
            names.append(f'<text class="publabel" x="{WIDTH - RIGHT}" y="{above:.1f}" text-anchor="end">{said}</text>')
    parts = [_frame(y), *lines]
    for i, encoder, s in found:
        x, shade = LEFT + (i + 0.5) * step, colour(i)
        said = f"{encoder}: {board.text(task, encoder, None)}"
        parts.append(f'<g stroke="{shade}" fill="{shade}"><title>{escape(said)}</title>')
        if s.n > 1:
            parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(s.low):.1f}" y2="{y(s.high):.1f}" stroke-width="2"/>')
        half = min(14.0, 0.4 * step)
        parts.append(
            f'<line x1="{x - half:.1f}" x2="{x + half:.1f}" y1="{y(s.mean):.1f}" y2="{y(s.mean):.1f}" stroke-width="3"/>'
        )
        for j, value in enumerate(board.values(task.name, encoder)):
            shift = 0.0 if s.n == 1 else half * 0.7 * (2 * j / (s.n - 1) - 1)
            parts.append(f'<circle cx="{x + shift:.1f}" cy="{y(value):.1f}" r="3" stroke="none" opacity="0.55"/>')
        parts.append("</g>")
    for i, encoder in enumerate(board.encoders):
        x, status = LEFT + (i + 0.5) * step, board.status(task.name, encoder)
        none = board.summary(task.name, encoder) is None and status != "not planned"
        parts.append(
            f'<text class="{"bad" if none else "tick"}" x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">'
            f"{i + 1}{' ✕' if none else ''}<title>{escape(f'{encoder} {status}')}</title></text>"
        )
    return _svg([*parts, *names], f"{task.title}: test {task.metric} of each encoder")


def curves(board: Leaderboard, task: Task) -> str:
    """Validation metric by epoch: thin lines are seeds, thick ones their means. Empty: no curve is known."""
    lines = [(i, s.curve) for i, e in enumerate(board.encoders) for s in board.cell(task.name, e) if s.curve]
    if not lines:
        return ""
    y = Axis([v for _, curve in lines for v in curve], HEIGHT - BOTTOM, TOP)
    epochs = max(len(curve) for _, curve in lines)
    parts = [_frame(y)]

    def x(epoch: float) -> float:
        return LEFT + (epoch - 1) / max(epochs - 1, 1) * (WIDTH - LEFT - RIGHT - 6)

    def line(curve: Sequence[float], number: int, width: float, opacity: float, said: str) -> str:
        title = f"<title>{escape(said)}</title>"
        if len(curve) == 1:
            return f'<circle cx="{x(1):.1f}" cy="{y(curve[0]):.1f}" r="{width + 1}" fill="{colour(number)}">{title}</circle>'
        points = " ".join(f"{x(epoch):.1f},{y(value):.1f}" for epoch, value in enumerate(curve, start=1))
        return (
            f'<polyline points="{points}" fill="none" stroke="{colour(number)}" stroke-width="{width}" '
            f'opacity="{opacity}">{title}</polyline>'
        )

    parts += [line(curve, i, 0.8, 0.4, board.encoders[i]) for i, curve in lines]
    for i, encoder in enumerate(board.encoders):
        if (mean := mean_curve(board, task, encoder)) is not None:
            parts.append(line([float(v) for v in mean], i, 2, 1, f"{encoder}: {board.settings(task.name, encoder)}"))
    whole = [t for t in ticks(0.5, epochs + 0.5, 6) if float(t).is_integer() and t >= 1]
    parts += [
        f'<text class="tick" x="{x(t):.1f}" y="{HEIGHT - 7}" text-anchor="middle">{label(t)}</text>' for t in whole
    ]
    return _svg(parts, f"{task.title}: validation {task.metric} by epoch")


def bar(estimate: Estimate, axis: Axis, number: int, width: int = BAR) -> str:
    """A value and its interval on a line of their own."""
    shade, at = colour(number), axis(estimate.value)
    parts = [f'<line class="grid" x1="0" x2="{width}" y1="9" y2="9"/>']
    if not math.isnan(estimate.low):
        low, high = axis(estimate.low), axis(estimate.high)
        parts.append(
            f'<rect x="{low:.1f}" y="5" width="{max(high - low, 1):.1f}" height="8" rx="2" fill="{shade}" opacity="0.35"/>'
        )
    parts.append(f'<rect x="{at - 1.5:.1f}" y="2" width="3" height="14" rx="1.5" fill="{shade}"/>')
    return f'<svg class="bar" viewBox="0 0 {width} 18" width="{width}" height="18" aria-hidden="true">{"".join(parts)}</svg>'


def scale(axis: Axis, width: int = BAR) -> str:
    """The numbers below a column of bars."""
    parts = []
    for t in ticks(axis.low, axis.high, 4):
        parts.append(f'<line class="grid" x1="{axis(t):.1f}" x2="{axis(t):.1f}" y1="0" y2="4"/>')
        parts.append(f'<text class="tick" x="{axis(t):.1f}" y="14" text-anchor="middle">{label(t)}</text>')
    return f'<svg class="bar" viewBox="0 0 {width} 18" width="{width}" height="18" aria-hidden="true">{"".join(parts)}</svg>'


def _frame(y: Axis) -> str:
    parts = []
    for t in ticks(y.low, y.high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(t):.1f}" y2="{y(t):.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 5}" y="{y(t) + 3.5:.1f}" text-anchor="end">{label(t)}</text>')
    return "".join(parts)


def _svg(parts: Sequence[str], title: str) -> str:
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
