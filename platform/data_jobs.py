"""The `copernicus data` commands that read shards or a benchmark's folders: what they print, around the jobs that do the work."""

from __future__ import annotations

import contextlib
import errno
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from copernicus.datasets.bench.tasks import TASKS, get_task
from copernicus.datasets.expand import expand
from copernicus.datasets.index import GridIndex, default_path, to_index
from copernicus.datasets.lookup import find_grid, parse_grid
from copernicus.datasets.sensors import SENSORS, InputError
from copernicus.platform.indexing import update_index
from copernicus.platform.progress import progress_bar
from copernicus.platform.session import ray_session

if TYPE_CHECKING:  # they bring torch and GDAL, seconds that an index, or a word about wrong input, need not wait for
    from copernicus.platform.verifying import Summary
    from copernicus.platform.verifying_bench import BenchSummary

SHOWN = 10
READ_ONLY = ("hf://", "http://", "https://")


def index_command(shards: Sequence[str], out: str | None, fresh: bool, console: Console) -> None:
    """Index the shards and say what they hold."""
    uris = expand(shards)
    path = out or default_path(uris)
    if path.startswith(READ_ONLY):
        raise InputError(f"{path.partition('://')[0]}:// can only be read: say where the index goes, --out FILE")
    if os.path.isdir(path):
        raise InputError(f"{path} is a folder; say --out FILE")
    with writing(path), progress_bar(console, "indexing") as update:
        table = update_index(uris, path, update, fresh)
    index = to_index(table)
    console.print(summary(index))
    print_problems(index, console)
    if not len(index):
        if "://" not in path:
            Path(path).unlink()
        raise InputError(
            f"no grid that could be used in {' '.join(shards)}: {index.problems[0] if index.problems else 'no member is of a known sensor'}"
        )
    console.print(f"Index: {path}", highlight=False, markup=False, soft_wrap=True)
    pattern = " ".join(shards)
    console.print(
        f"Next: copernicus data verify {pattern}, or copernicus run EXPERIMENT.yaml 'pretrain.shards=[{pattern}]'",
        highlight=False, markup=False, soft_wrap=True,
    )  # fmt: skip


@contextlib.contextmanager
def writing(path: str) -> Iterator[None]:
    """Says what to do where a file cannot be written at all."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
            raise InputError(f"{path} cannot be written ({error.strerror}); say --out FILE") from None
        raise


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


def verify_command(places: Sequence[str], out: str, console: Console) -> int:
    """Read everything in the shards, or in the benchmark's folders, print what it comes to and return the number of rows
    with a fault.

    Raises:
        InputError: neither shards nor tasks, or both.
    """
    from copernicus.platform.verifying import check_place, verify_shards

    tasks = bench_tasks(places)
    check_place(out)
    if tasks:
        return _verify_bench(tasks, out, console)
    uris = expand(places)
    with writing(out), progress_bar(console, "verifying") as update:
        summary = verify_shards(uris, out, update)
    console.print(by_sensor(summary))
    if summary.faults or summary.notes:
        console.print(by_reason(summary))
    console.print(f"Report, a row a member: {out}", highlight=False, markup=False, soft_wrap=True)
    return summary.faulty


def bench_tasks(places: Sequence[str]) -> list[tuple[str, Path]]:
    """The tasks of Copernicus-Bench in these folders, with the folder of each; none where they hold shards.

    Raises:
        InputError: a folder holds neither, or some hold the one and some the other.
    """
    from copernicus.datasets.bench.verify import find_tasks

    found: list[tuple[str, Path]] = []
    others = []
    for place in places:
        folder = Path(place).expanduser().absolute()
        if "://" in place or not folder.is_dir() or any(folder.glob("*.tar")):
            others.append(place)
        elif names := find_tasks(folder):
            found += [(name, folder) for name in names]
        else:
            raise InputError(
                f"folder {place} holds no shards (*.tar) and no task of Copernicus-Bench; its folders would be "
                f"{', '.join(sorted({task.directory for task in TASKS.values()}))}"
            )
    if found and others:
        raise InputError(
            f"{others[0]} holds shards and {found[0][1]} tasks of Copernicus-Bench: verify one after the other"
        )
    return found


def _verify_bench(tasks: Sequence[tuple[str, Path]], out: str, console: Console) -> int:
    from copernicus.platform.verifying_bench import verify_bench

    with writing(out), ray_session(), progress_bar(console, "verifying") as update:
        summary = verify_bench(tasks, out, update)
    console.print(by_split(summary))
    if summary.faults or summary.notes:
        console.print(by_reason(summary))
    console.print(f"Report, a row a sample: {out}", highlight=False, markup=False, soft_wrap=True)
    return summary.faulty


def by_split(summary: BenchSummary) -> Table:
    """Samples by task and split: how many are sound, and what values their images hold."""
    table = Table(title=f"{len({task for task, _ in summary.splits})} tasks of Copernicus-Bench")
    for column in ("task", "split", "samples", "published", "ok", "faults", "notes", "finite", "values as stored"):
        table.add_column(column, justify="left" if column in ("task", "split", "values as stored") else "right")
    for (task, split), tally in summary.splits.items():
        table.add_row(
            task, split, f"{tally.listed}", f"{get_task(task).splits[split]}", f"{tally.listed - tally.faulty}",
            f"[red]{tally.faulty}[/]" if tally.faulty else "0", f"{tally.noted}",
            f"{sum(tally.finite) / len(tally.finite):.1%}" if tally.finite else "",
            f"{tally.low:.4g} .. {tally.high:.4g}" if tally.low <= tally.high else "",
        )  # fmt: skip
    return table


def by_sensor(summary: Summary) -> Table:
    """Members by sensor: how many are sound, and what values they hold."""
    from copernicus.platform.verifying import NAMES, REST

    table = Table(title=f"{summary.grids} grids in {summary.shards} shards")
    for column in ("sensor", "members", "ok", "faults", "notes", "finite", "values as stored"):
        table.add_column(column, justify="left" if column in ("sensor", "values as stored") else "right")
    for name, tally in summary.sensors.items():
        if name == NAMES:
            table.add_section()
        if name == REST and not tally.members:
            continue
        table.add_row(
            name, f"{tally.members}", f"{tally.members - tally.faulty}",
            f"[red]{tally.faulty}[/]" if tally.faulty else "0", f"{tally.noted}",
            "" if tally.finite is None else f"{tally.finite:.1%}",
            f"{tally.low:.4g} .. {tally.high:.4g}" if tally.low <= tally.high else "",
        )  # fmt: skip
    return table


def by_reason(summary: Summary | BenchSummary) -> Table:
    """How many of each fault and of each note, and the first ones by name."""
    table = Table(show_lines=False)
    table.add_column("reason")
    table.add_column("rows", justify="right")
    table.add_column("the first of them", overflow="fold")
    for counts, style in ((summary.faults, "red"), (summary.notes, "yellow")):
        for reason, count in counts.most_common():
            named = [f"{place}  {said}" for place, said in summary.first[reason]]
            more = [f"... and {count - len(named)} more"] if count > len(named) else []
            table.add_row(f"[{style}]{reason}[/]", f"{count}", escape("\n".join([*named, *more])))
        table.add_section()
    return table


def show_command(grid: str, shards: Sequence[str], out: Path | None, console: Console) -> None:
    """Draw one grid of the shards."""
    key = parse_grid(grid)
    out = out or Path(f"{key}.png")
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise InputError(f"--out {out}: name a file in a folder that exists, such as {key}.png")
    uris = expand(shards)
    with progress_bar(console, "looking for it") as update:
        uri, found = find_grid(key, uris, update)
    from copernicus.platform.show import draw_grid

    for problem in draw_grid(uri, found, out):
        console.print(problem, style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Grid {key} of {uri}: look at {out}", highlight=False, markup=False, soft_wrap=True)
