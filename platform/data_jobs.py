"""The `copernicus data` commands that read shards: what they print, around the jobs that do the work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from copernicus.datasets.expand import expand
from copernicus.datasets.index import GridIndex, default_path, to_index
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.platform.indexing import update_index
from copernicus.platform.run import progress_bar
from copernicus.platform.session import ray_session

SHOWN = 10
READ_ONLY = ("hf://", "http://", "https://")


def index_command(shards: Sequence[str], out: str | None, fresh: bool, console: Console) -> None:
    """Index the shards and say what they hold."""
    uris = expand(shards)
    path = out or default_path(uris)
    if path.startswith(READ_ONLY):
        raise InputError(f"{path.partition('://')[0]}:// can only be read: say where the index goes, --out FILE")
    try:
        with ray_session(), progress_bar(console, "indexing") as update:
            table = update_index(uris, path, update, fresh)
    except PermissionError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}); say --out FILE") from None
    index = to_index(table)
    console.print(summary(index))
    print_problems(index, console)
    console.print(f"Index: {path}", highlight=False, markup=False, soft_wrap=True)
    pattern = " ".join(shards)
    console.print(
        f"Next: copernicus data verify {pattern}, or copernicus run EXPERIMENT.yaml 'pretrain.shards=[{pattern}]'",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


def summary(index: GridIndex) -> Table:
    """Grids by sensor: how many have it, and what must be read whole."""
    table = Table(title=f"{len(index)} grids in {len(index.shards)} shards")
    for column in ("sensor", "grids", "missing", "stored as", "read whole"):
        table.add_column(column, justify="left" if column in ("sensor", "stored as") else "right")
    rows = index.table.take(index.rows)
    for name in SENSORS:
        column = rows[name].combine_chunks()
        there = column.drop_null()
        shapes = Counter(
            zip(there.field("dtype").to_pylist(), map(tuple, there.field("shape").to_pylist()), strict=True)
        )
        common = ", ".join(f"{dtype} {'x'.join(map(str, shape))}" for (dtype, shape), _ in shapes.most_common(2))
        whole = sum(bool(w) for w in there.field("whole").to_pylist())
        table.add_row(
            name, f"{len(there)}", f"{column.null_count}", common + (", ..." if len(shapes) > 2 else ""), f"{whole}"
        )
    everything = len(index) - sum(bool(m) for m in rows["missing"].to_pylist())
    table.add_section()
    table.add_row("all eight", f"{everything}", f"{len(index) - everything}", "", "")
    return table


def print_problems(index: GridIndex, console: Console) -> None:
    """How many of each kind, and the first ones by name."""
    if not index.problems:
        return
    counts = Counter(p.reason for p in index.problems)
    said = ", ".join(f"{n} {reason}" for reason, n in counts.most_common())
    console.print(f"[yellow]{len(index.problems)} problems[/]: {said}")
    for problem in index.problems[:SHOWN]:
        console.print(f"  {problem}", style="yellow", highlight=False, markup=False, soft_wrap=True)
    if len(index.problems) > SHOWN:
        console.print(f"  ... and {len(index.problems) - SHOWN} more: column `problems` of the index")
