"""From one worker to more on one machine, the same global batch: samples a second of the platform and of plain torch DDP.

python tests/benchmarks/scaling.py                       about eight minutes on two idle cores, 800 MB of disk
python tests/benchmarks/scaling.py --share 0.1 --rounds 1    to see it run

Each worker computes on one thread. Reading takes processor time beside it (one process a worker), so two workers on two
cores cannot be twice as fast as one: what plain torch gains under DDP is what there is to gain, and samples/core-s says
what a sample costs. The largest difference between losses shows that all train the same. Linux only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table
from train_overhead import SIDES, difference
from training.cases import CASES, made, with_workers, work
from training.child import measure
from training.load import load
from training.work import Result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["small"], choices=list(CASES))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--grids", type=int, default=16, help="full-size grids, 48 MB each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="in which all take a turn (%(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps (%(default)s)")
    arguments = parser.parse_args()
    console = Console(width=140)
    console.print(f"{load()}; {os.cpu_count()} cores, one thread a worker")
    table = Table(title="Steady state, the same global batch")
    for name in ("model", "side", "workers", "samples/s of each round", "samples/s", "speed-up", "samples/core-s"):
        table.add_column(name, justify="left" if name in ("model", "side") else "right")
    with tempfile.TemporaryDirectory(prefix="sc") as name:
        folder = Path(name)
        shards = made(folder, arguments.grids)
        for model in arguments.models:
            asked = work(CASES[model], shards, arguments.grids, arguments.share)
            turns = [(side, workers) for workers in arguments.workers for side in SIDES]
            results: dict[tuple[str, int], list[Result]] = {turn: [] for turn in turns}
            for number in range(arguments.rounds):
                for side, workers in turns if number % 2 == 0 else reversed(turns):
                    with console.status(f"{model}: {SIDES[side]}, {workers} workers, round {number + 1}"):
                        results[side, workers].append(measure(side, with_workers(asked, workers), folder))
            for side in SIDES:
                first = None
                for workers in arguments.workers:
                    found = results[side, workers]
                    rates = [asked.batch_size / result.mean_s for result in found]
                    rate = statistics.median(rates)
                    first = first or rate
                    core_s = statistics.median(result.core_s for result in found)
                    table.add_row(
                        model, SIDES[side], str(workers), "  ".join(f"{r:.2f}" for r in rates), f"{rate:.2f}",
                        f"{rate / first:.2f}", f"{asked.batch_size / core_s:.2f}",
                    )  # fmt: skip
            losses = {SIDES[side]: [r for w in arguments.workers for r in results[side, w]] for side in SIDES}
            table.add_row("", f"losses differ by {difference(losses):.1e} at most", end_section=True)
    console.print(table)
    console.print(load())


if __name__ == "__main__":
    main()
