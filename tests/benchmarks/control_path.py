"""Does the control path limit 256 workers? Index, order and planning of rows as a run does them, with nothing read or trained.

python tests/benchmarks/control_path.py                    310,000 grids measured; 100 million where they fit, else scaled
python tests/benchmarks/control_path.py --grids 20000 --large 1000000 --seconds 2     to see it run

Measured on this machine, each part in a process of its own: the index of so many grids of the published layout (names,
dates, places and offsets made up), its file and its memory; the permutation of an epoch, at both sizes; rows planned a second
by one reading CPU (position, grid, entry of the index, patch, date and crop: all of a draw but its bytes); and blocks a second
that one rank's Ray Data loop schedules when reading is free, with its tasks, its consumer and Ray itself on the same cores.
What follows by arithmetic from a smaller measurement is marked ~. Needed: what one rank, or all, would use up on H100s, by
LOG.md's step of the base model. Memory stays below 6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.table import Table

from copernicus.datasets.index import SCHEMA, _stamped, read_index, to_index, write_index
from copernicus.datasets.order import Coverage, Order, permutation
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.shards import LEADING_AXES, STORED_DTYPE
from copernicus.datasets.slices import DrawReader
from copernicus.platform.measured import (
    ATMOSPHERE_DATES,
    H100_BATCH,
    H100_STEP_S,
    STORED_DATES,
    STORED_PATCHES,
)
from copernicus.platform.plan import read_seconds
from copernicus.platform.stream import ROWS_PER_BLOCK, Share, batches

RANKS, PER_SHARD, EPOCHS = 256, 100, 100
NEEDED = H100_BATCH / H100_STEP_S.value
"""Samples a second of one rank."""
NODE_BYTES = 64e9
"""Of a node's memory, for the driver's start."""
CONCURRENT = 4
"""Reading tasks at a time of the one rank whose scheduling is measured; each is a process of 0.4 GB."""


def made_table(grids: int) -> pa.Table:
    """An index of that many grids: the published shapes, random dates and places, arrays one after another in a shard."""
    rng = np.random.default_rng(0)

    def lists(values: pa.Array, each: int) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(np.arange(grids + 1) * each, pa.int32()), values)

    def repeated(text: str) -> pa.Array:
        return pa.DictionaryArray.from_arrays(np.zeros(grids, np.int32), [text]).cast(pa.string())

    columns: dict[str, pa.Array] = {}
    numbers = np.arange(grids)
    shard_names = [f"/data/copernicus-pretrain/example-{i:06d}.tar" for i in range(-(-grids // PER_SHARD))]
    columns["shard"] = pa.DictionaryArray.from_arrays((numbers // PER_SHARD).astype(np.int32), shard_names).cast(
        pa.string()
    )
    columns["grid"] = pa.array([f"{n:07d}" for n in range(grids)])
    columns["lon"], columns["lat"] = (pa.array(rng.uniform(-limit, limit, grids).round(2)) for limit in (180, 90))
    columns["missing"] = lists(pa.array([], pa.string()), 0)
    columns["problems"] = lists(pa.array([], SCHEMA.field("problems").type.value_type), 0)
    offset = (numbers % PER_SHARD).astype(np.int64) * 48_000_000
    for name, sensor in SENSORS.items():
        axes = LEADING_AXES[name]
        dates = STORED_DATES.get(name, ATMOSPHERE_DATES)
        leading = [STORED_PATCHES if axis == "patch" else dates for axis in axes]
        shape = [*leading, *([] if name == "dem" else [sensor.channels]), sensor.stored_size, sensor.stored_size]
        size = int(np.prod(shape)) * STORED_DTYPE[name].itemsize
        images, patches = (int(np.prod(leading)) if leading else 0), (STORED_PATCHES if len(leading) == 2 else 0)
        fields = {
            "dtype": repeated(STORED_DTYPE[name].name),
            "shape": lists(pa.array(np.tile(np.array(shape, np.int32), grids)), len(shape)),
            "offset": pa.array(offset + 1024), "member": pa.array(offset + 512), "size": pa.array(np.full(grids, size)),
            "whole": repeated(""),
            "days": lists(pa.array(rng.integers(18000, 19000, grids * images, np.int32)), images),
            "lon": lists(pa.array(rng.uniform(-180, 180, grids * patches).round(4)), patches),
            "lat": lists(pa.array(rng.uniform(-90, 90, grids * patches).round(4)), patches),
            "local": lists(pa.DictionaryArray.from_arrays(rng.integers(0, 10_000, grids * patches).astype(np.int32),
                                                          [str(n) for n in range(10_000)]).cast(pa.string()), patches),
            "files": lists(pa.array([], pa.string()), 0),
        }  # fmt: skip
        columns[name] = pa.StructArray.from_arrays(list(fields.values()), list(fields))
        offset = offset + size + 1024
    shards = [
        {"uri": uri, "stamp": [4_800_000_000, "1"], "digest": f"{i:016x}", "problems": []} for i, uri in enumerate(shard_names)
    ]  # fmt: skip
    return _stamped(pa.table(columns).cast(SCHEMA), shards)


def timed(part: Callable[[], Any]) -> tuple[float, Any]:
    started = time.process_time()
    result = part()
    return time.process_time() - started, result


def make(path: str, grids: int) -> dict[str, float]:
    write_index(made_table(grids), path)
    return {"bytes": os.path.getsize(path)}


def load(path: str) -> dict[str, float]:
    """What the driver does before the first step."""
    before = peak()
    read_s, table = timed(lambda: read_index(path))
    index_s, index = timed(lambda: to_index(table))
    split_s, (train, _) = timed(lambda: index.having(list(SENSORS)).split(0.005, 0))
    keys_s, _ = timed(lambda: Coverage.expected(train.keys, 1))
    return {
        "read_s": read_s, "index_s": index_s, "split_s": split_s, "keys_s": keys_s,
        "table_bytes": index.table.nbytes, "peak_bytes": peak() - before,
    }  # fmt: skip


def order(grids: int) -> dict[str, float]:
    """One epoch's permutation, which each process that reads makes once an epoch, and a batch's positions of a rank."""
    seconds, drawn = timed(lambda: permutation(0, 0, 0, grids))
    plan, batch_size, times = Order(grids, epochs=EPOCHS), RANKS * H100_BATCH, 2000
    local = np.arange(H100_BATCH)
    positions_s, _ = timed(lambda: [plan.positions(local, 7, RANKS, batch_size, 5) for _ in range(times)])
    return {"seconds": seconds, "bytes": drawn.nbytes, "positions_s": positions_s / times, "peak_bytes": peak()}


def full_reader() -> DrawReader:
    return DrawReader(tuple(SENSORS.values()), {s.name: s.image_size for s in SENSORS.values()})


def rows(path: str, seconds: float) -> dict[str, float]:
    """Rows planned by one CPU, in blocks as a reading task plans them."""
    index = to_index(read_index(path))
    plan = Order(len(index), epochs=EPOCHS)
    reader = full_reader()
    plan.locate(0)
    count, block, spent, located, looked_up = 0, 0, 0.0, 0.0, 0.0
    while spent < seconds:
        a = time.process_time()
        positions = plan.positions(np.arange(block, block + ROWS_PER_BLOCK), 3, RANKS, RANKS * H100_BATCH)
        places = [plan.locate(int(p)) for p in positions if 0 <= p < len(index)]
        b = time.process_time()
        entries = index.entries(place[2] for place in places)
        c = time.process_time()
        for entry, place in zip(entries, places, strict=True):
            for choice in reader.choose(entry, *place[:2]).values():
                choice.span()
        d = time.process_time()
        spent, located, looked_up = spent + d - a, located + b - a, looked_up + c - b
        count += len(places)
        block = (block + ROWS_PER_BLOCK) % (len(index) // RANKS // ROWS_PER_BLOCK * ROWS_PER_BLOCK)
    return {"rate": count / spent, "locate_us": located / count * 1e6, "entry_us": looked_up / count * 1e6}


class NoReader:
    """In the place of `DrawReader`: rows of a draw without its images."""

    row_bytes = 64

    def batch(self, draws: list[tuple[Any, int, int] | None]) -> dict[str, np.ndarray]:
        return {
            "epoch": np.array([-1 if draw is None else draw[1] for draw in draws], np.int32),
            "key": np.array(["" if draw is None else draw[0].key for draw in draws]),
        }


def schedule(path: str, seconds: float) -> dict[str, float]:
    """Blocks that one rank's loop starts and hands on, its index in Ray's store."""
    import logging

    import ray

    ray.init(
        address="local", num_cpus=CONCURRENT, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        object_store_memory=2 << 30,
    )  # fmt: skip
    index = to_index(read_index(path))
    put_s, reference = timed(lambda: ray.put(index))
    batch_size = RANKS * H100_BATCH
    epochs = -(-batch_size * 40_000 // len(index))
    share = Share(reference, Order(len(index), epochs=epochs), NoReader(), batch_size, 7, RANKS)  # type: ignore[arg-type]
    stream = batches(share, CONCURRENT * RANKS)
    began = time.perf_counter()
    next(stream)
    first_s = time.perf_counter() - began
    for _ in range(50):
        next(stream)
    began, spent, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        next(stream)
        count += 1
    blocks = count * share.rows_per_batch / ROWS_PER_BLOCK
    elapsed, driver = time.perf_counter() - began, time.process_time() - spent
    # No ray.shutdown(): a stream of which more is being read would end the process before it answers.
    return {
        "blocks_per_s": blocks / elapsed, "driver_s": driver / blocks, "first_s": first_s, "put_s": put_s,
        "segments": blocks / 1024,
    }  # fmt: skip


PARTS: dict[str, Callable[..., dict[str, float]]] = {
    "make": make, "load": load, "order": order, "rows": rows, "schedule": schedule,
}  # fmt: skip


def peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run(part: str, *arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, "--part", part, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{part} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=310_000, help="of the index that is made (%(default)s)")
    parser.add_argument("--large", type=int, default=100_000_000, help="of the other column (%(default)s)")
    parser.add_argument("--seconds", type=float, default=8, help="of each rate (%(default)s)")
    parser.add_argument("--no-ray", action="store_true", help="leave scheduling out")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        part, given = arguments.part
        print(json.dumps(PARTS[part](*json.loads(given))))
        return
    small, large, console = arguments.grids, arguments.large, Console(width=160)
    with tempfile.TemporaryDirectory(prefix="cp") as folder:
        path = str(Path(folder) / "index.parquet")
        with console.status("index"):
            made, loaded = run("make", path, small), run("load", path)
        with console.status("order"):
            orders = [run("order", grids) for grids in (small, large)]
        with console.status("rows"):
            planned = run("rows", path, arguments.seconds)
        with console.status("scheduling"):
            scheduled = None if arguments.no_ray else run("schedule", path, arguments.seconds)
    show(console, small, large, made, loaded, orders, planned, scheduled)


def show(
    console: Console, small: int, large: int, made: dict[str, float], loaded: dict[str, float],
    orders: list[dict[str, float]], planned: dict[str, float], scheduled: dict[str, float] | None,
) -> None:  # fmt: skip
    table = Table(title=f"The control path of {RANKS} ranks, CPU seconds of one core; ~ scaled from {small:,} grids")
    for name in ("what", f"{small:,} grids", f"{large:,} grids", "needed", "times what is needed"):
        table.add_column(name, justify="left" if name == "what" else "right")
    factor = large / small
    epochs = [grids / (NEEDED * RANKS) for grids in (small, large)]

    def grown(name: str, value: float, unit: str, digits: int = 1) -> None:
        table.add_row(name, f"{value:,.{digits}f} {unit}", f"~ {value * factor:,.0f} {unit}", "", "")

    def rate(name: str, values: tuple[float, float | None], needed: float, unit: str) -> None:
        shown = [f"{v:,.0f} {unit}" if v is not None else "the same" for v in values]
        table.add_row(name, *shown, f"{needed:,.0f} {unit}", f"{values[0] / needed:,.1f}")

    grown("index file", made["bytes"] / 1e6, "MB")
    grown("index in memory, once a node", loaded["table_bytes"] / 1e6, "MB")
    grown("peak memory of the driver at its start", loaded["peak_bytes"] / 1e6, "MB")
    fitting = NODE_BYTES / (loaded["peak_bytes"] / small)
    table.add_row(f"  grids with which {NODE_BYTES / 1e9:.0f} GB are full", f"~ {fitting:,.0f}", "", "", "")
    grown("read the index file", loaded["read_s"], "s", 2)
    grown("take its usable grids", loaded["index_s"], "s", 2)
    grown("choose held-out grids", loaded["split_s"], "s", 2)
    grown("hash keys, to prove epochs whole", loaded["keys_s"], "s", 2)
    table.add_section()
    table.add_row(
        "an epoch's order, each process once", *(f"{o['seconds']:.3f} s" for o in orders),
        " / ".join(f"{e:,.1f} s an epoch" for e in epochs),
        " / ".join(f"{e / o['seconds']:,.0f}" for e, o in zip(epochs, orders, strict=True)),
    )  # fmt: skip
    table.add_row(
        "its memory, each process (up to 2 are kept)", *(f"{o['bytes'] / 1e6:,.1f} MB" for o in orders), "", ""
    )
    rate(
        "batches of a rank numbered",
        (1 / orders[0]["positions_s"], 1 / orders[1]["positions_s"]),
        NEEDED / H100_BATCH,
        "/s",
    )
    table.add_section()
    reading = 1 / read_seconds(full_reader().row_bytes)
    rate("rows planned by a CPU that reads", (planned["rate"], None), reading, "/s")
    table.add_row(
        "  of a row's microseconds", f"order {planned['locate_us']:.0f}, index {planned['entry_us']:.0f}, draws "
        f"{1e6 / planned['rate'] - planned['locate_us'] - planned['entry_us']:.0f}", "", "", "",
    )  # fmt: skip
    cpus = RANKS * NEEDED / reading
    rate(
        f"rows planned by all {RANKS} ranks' {cpus:,.0f} reading CPUs",
        (planned["rate"] * cpus, None),
        RANKS * NEEDED,
        "/s",
    )
    if scheduled is not None:
        table.add_section()
        rate(
            "blocks scheduled by a rank, tasks on the same cores",
            (scheduled["blocks_per_s"], None),
            NEEDED / ROWS_PER_BLOCK,
            "/s",
        )
        rate("  by its own processor time alone", (1 / scheduled["driver_s"], None), NEEDED / ROWS_PER_BLOCK, "/s")
        table.add_row("  first batch", f"{scheduled['first_s']:.1f} s", "", "", "")
        table.add_row(
            "  index into Ray's store", f"{scheduled['put_s']:.2f} s", f"~ {scheduled['put_s'] * factor:,.0f} s", "", ""
        )
    console.print(table)


if __name__ == "__main__":
    main()
