"""What a long command shows while it runs: bars on a terminal, a line now and then in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress_bar(console: Console, title: str) -> Iterator[Any]:
    """``update(done, total, note)`` draws a bar with elapsed and remaining time; off a terminal it prints a line now and
    then instead."""
    if not console.is_terminal:
        last = [0.0]

        def line(done: float, total: float, note: str = "") -> None:
            if time.monotonic() - last[0] > 20 or done >= total:
                last[0] = time.monotonic()
                console.print(f"  {title} {done:g}/{total:g} {note}", highlight=False)

        yield line
        return
    columns = (
        TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None, note="")

        def update(done: float, total: float, note: str = "") -> None:
            progress.update(task, completed=done, total=total, note=note)

        yield update


def spell_time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def short_path(path: Path) -> str:
    """Relative to the working directory where that is shorter."""
    with contextlib.suppress(ValueError):
        return str(path.absolute().relative_to(Path.cwd()))
    return str(path)
