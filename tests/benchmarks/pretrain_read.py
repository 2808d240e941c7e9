"""Reading pretraining samples: ours beside the public pipeline on the same shards, the same cores, in one run.

python tests/benchmarks/pretrain_read.py [--grids 32] [--seconds 6]

About seven minutes on two idle cores, 2 GB in a temporary folder, up to 12 GB of memory (the public pipeline's; what the
machine has no memory for is left out, and said so). Linux only. Each measurement runs in fresh processes of one torch
thread each; start-up counts from the call that makes the index or the pipeline, after imports and after Ray is up.
samples/core-s: samples per second of processor time, which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from reading.child import Result
from reading.floor import Floor, evict, measure, warm
from reading.made import PUBLISHED, SMALL, Layout, make_shards, repeat_shard
from reading.measure import Peak, available_bytes
from reading.work import Work
from rich.console import Console
from rich.table import Table

WORKERS: dict[str, dict[str, tuple[int, ...]]] = {
    "slices": {"ours": (0,), "public": (0, 1)},
    "batches": {"ours": (0, 1, 2), "public": (0, 1, 2)},
}
"""Configurations tried; the best one is a side's figure."""
GROWTH = (10, 100, 1000)
GRIDS_PER_SMALL_SHARD = 4
MB = 1e6
console = Console(width=140)


class Bench:
    def __init__(self, folder: Path, seconds: float):
        self.folder, self.seconds = folder, seconds

    def run(self, side: str, work: Work) -> Result:
        """In a process of its own, its memory watched from here."""
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parent),
            "TMPDIR": str(self.folder),
        }
        command = [sys.executable, "-m", "reading.child", side, json.dumps(dataclasses.asdict(work)), str(self.seconds)]
        with (
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            ) as process,
            Peak(process.pid) as peak,
            console.status(f"{side}: {work.task}, {len(work.shards)} shards, {work.workers} workers"),
        ):
            out, err = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{side} {work.task} with {work.workers} workers failed:\n{err}")
        return dataclasses.replace(Result(**json.loads(out.splitlines()[-1])), peak_bytes=peak.bytes)

    def compare(self, title: str, work: Work, grid_bytes: int) -> dict[str, int]:
        """All configurations of both sides; side -> the workers of its fastest one."""
        table = Table(title=title)
        for name in ("side", "workers", "samples/s", "samples/core-s", "MB read/sample", "peak MB", "first s"):
            table.add_column(name, justify="left" if name == "side" else "right")
        results: dict[str, list[tuple[Result, int]]] = {"ours": [], "public": []}

        def measure_one(side: str, workers: int) -> None:
            # Raw grids in the buffer, decoded ones in flight, the batches.
            need = (work.shuffle_buffer + 40) * grid_bytes * max(workers, 1) if side == "public" else 0
            if need > 0.8 * available_bytes():
                table.add_row(side, str(workers), f"left out: needs {need / 1e9:.0f} GB of memory")
                return
            result = self.run(side, dataclasses.replace(work, workers=workers))
            table.add_row(
                side, str(workers), f"{result.rate:.1f}", f"{result.per_core:.1f}",
                f"{result.bytes_per_sample / MB:.2f}", f"{result.peak_bytes / MB:.0f}", f"{result.start_s:.2f}",
            )  # fmt: skip
            results[side].append((result, workers))

        for side, configurations in WORKERS[work.task].items():
            for workers in configurations:
                measure_one(side, workers)
        fastest = {side: max(found, key=lambda r: r[0].rate)[1] for side, found in results.items() if found}
        # Ours once more: other work on the machine shows as a difference within a side.
        measure_one("ours", fastest["ours"])
        if results["public"]:
            ours, public = ([result for result, _ in results[side]] for side in ("ours", "public"))
            table.add_section()
            table.add_row(
                "ours / public, each column's best", "",
                f"{max(r.rate for r in ours) / max(r.rate for r in public):.1f} x",
                f"{max(r.per_core for r in ours) / max(r.per_core for r in public):.1f} x",
                f"{_bytes(ours) / _bytes(public):.2f} x",
                f"{min(r.peak_bytes for r in ours) / min(r.peak_bytes for r in public):.2f} x",
                f"{min(r.start_s for r in ours) / min(r.start_s for r in public):.2f} x",
            )  # fmt: skip
        console.print(table)
        return fastest

    def cold(self, work: Work) -> None:
        table = Table(
            title="One pass over grids that are not in the page cache, slices alone, in process, index included"
        )
        for name in ("side", "samples/s", "samples/core-s", "MB read/sample"):
            table.add_column(name, justify="left" if name == "side" else "right")
        for side in ("ours", "public", "ours"):
            evict(work.shards)
            result = self.run(side, dataclasses.replace(work, once=True))
            table.add_row(side, f"{result.rate:.1f}", f"{result.per_core:.1f}", f"{result.bytes_per_sample / MB:.2f}")
        console.print(table)

    def growth(self, work: Work, workers: dict[str, int], large: tuple[str, ...], grids: int) -> None:
        table = Table(title=f"More shards, {GRIDS_PER_SMALL_SHARD} grids of one token a sensor in each, batches")
        for name in ("side", "workers", "shards", "index s", "then first s", "samples/s", "samples/core-s", "peak MB"):
            table.add_column(name, justify="left" if name == "side" else "right")
        for side, count in workers.items():
            for shards in GROWTH:
                result = self.run(
                    side, dataclasses.replace(work, shards=work.shards[:shards], sizes=SMALL.crop, workers=count)
                )
                table.add_row(
                    side, str(count), f"{shards:,}", f"{result.index_s:.3f}", f"{result.first_s:.2f}",
                    f"{result.rate:.0f}", f"{result.per_core:.0f}", f"{result.peak_bytes / MB:.0f}",
                )  # fmt: skip
            table.add_section()
        # The same number of shards and of grids, arrays of other sizes.
        small = make_shards(self.folder / "same", SMALL, grids, -(-grids // len(large)))
        for name, paths, layout in (("small", small, SMALL), ("full-size", large, PUBLISHED)):
            result = self.run("ours", dataclasses.replace(work, shards=paths, sizes=layout.crop, workers=0))
            table.add_row(
                f"ours, {grids} {name} grids", "0", str(len(paths)), f"{result.index_s:.3f}", f"{result.first_s:.2f}"
            )
        console.print(table)


def _bytes(results: list[Result]) -> float:
    # The median: what workers read ahead of a short window, or behind it, would make the least of them too small.
    return statistics.median(result.bytes_per_sample for result in results)


def show_floor(floor: Floor, layout: Layout) -> None:
    table = Table(
        title=f"The floor: {layout.sample_bytes / MB:.2f} MB a draw uses of {layout.grid_bytes / MB:.1f}, one thread"
    )
    for name in ("what", "samples/s", "MB/s"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for what, samples in (
        ("memcpy of the used bytes", floor.copied),
        ("pread of the used slices, page cache", floor.cached),
        ("pread of the used slices, disk", floor.cold_slices),
        ("shards from front to back, disk, whole grids", floor.cold_sequential / layout.grid_bytes),
    ):
        size = layout.grid_bytes if "whole" in what else layout.sample_bytes
        table.add_row(what, f"{samples:,.0f}", f"{samples * size / MB:,.0f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=int, default=32, help="full-size grids, 48 MB each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=6, help="of each steady window (%(default)s)")
    parser.add_argument("--buffer", type=int, default=100, help="grids in the public shuffle buffer (%(default)s)")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder (the system's)")
    arguments = parser.parse_args()
    began = time.monotonic()
    # A short name: Ray's sockets lie in it, and their paths may have 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="pr", dir=arguments.folder))
    try:
        bench = Bench(folder, arguments.seconds)
        large = make_shards(folder / "large", PUBLISHED, arguments.grids, -(-arguments.grids // 4))
        (one,) = make_shards(folder / "one", SMALL, GRIDS_PER_SMALL_SHARD, GRIDS_PER_SMALL_SHARD)
        small = repeat_shard(one, folder / "small", GROWTH[-1])
        console.print(f"{arguments.grids} grids in {len(large)} shards; made in {time.monotonic() - began:.0f} s")
        show_floor(measure(PUBLISHED, large, min(2, arguments.seconds)), PUBLISHED)
        warm(large)
        work = Work("slices", large, PUBLISHED.crop, shuffle_buffer=arguments.buffer)
        bench.compare("Slices alone: patch and date of every sensor, no crop; page cache", work, PUBLISHED.grid_bytes)
        batches = dataclasses.replace(work, task="batches")
        fastest = bench.compare(
            f"End to end into torch batches of {work.batch_size}: random crop and flip; page cache",
            batches,
            PUBLISHED.grid_bytes,
        )
        bench.growth(dataclasses.replace(batches, shards=small), fastest, large, arguments.grids)
        bench.cold(work)
        console.print(f"{(time.monotonic() - began) / 60:.1f} minutes in all")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
