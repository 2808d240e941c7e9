"""What Ray Train, Ray Data and the platform's loop cost beside a plain torch loop: seconds a step, on one node, one worker.

python tests/benchmarks/train_overhead.py                       about ten minutes on two idle cores, 800 MB of disk
python tests/benchmarks/train_overhead.py --share 0.1 --rounds 1    to see it run

Both sides train the same model on the same samples in the same order, which their losses prove; the model computes on one
thread, one more process reads. Ours is `pretrain` as `copernicus run` calls it, figures and all. The plain loop has a torch
`DataLoader` with one process over the same reader. They take turns, each time in fresh processes; start-up and the first
steps do not count. core-s: processor time of all processes, Ray's own included, which other work on the machine disturbs
least. Linux only.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from reading.measure import available_bytes
from rich.console import Console
from rich.table import Table
from training.cases import CASES, made, work
from training.child import measure
from training.load import load
from training.work import Result

SIDES = {"plain": "plain torch", "ours": "Ray Train + Ray Data"}


def difference(results: dict[str, list[Result]]) -> float:
    """The largest one between losses of a step, of both sides and all rounds."""
    runs = [result.losses for found in results.values() for result in found]
    return max(max(step) - min(step) for step in zip(*runs, strict=True))


def compared(title: str, results: dict[str, list[Result]]) -> Table:
    table = Table(title=title)
    for name in ("side", "mean s of each round", "median step, s", "core-s", "steps"):
        table.add_column(name, justify="left" if name == "side" else "right")
    for side, found in results.items():
        table.add_row(
            SIDES[side], "  ".join(f"{r.mean_s:.4f}" for r in found),
            f"{statistics.median(s for r in found for s in r.seconds):.4f}",
            f"{statistics.median(r.core_s for r in found):.4f}", str(len(found[0].seconds)),
        )  # fmt: skip
    plain, ours = results["plain"], results["ours"]
    steps = [statistics.median(s for r in side for s in r.seconds) for side in (ours, plain)]
    table.add_row(
        "ratio", "  ".join(f"{o.mean_s / p.mean_s:.3f}" for o, p in zip(ours, plain, strict=True)),
        f"{steps[0] / steps[1]:.3f}",
        f"{statistics.median(r.core_s for r in ours) / statistics.median(r.core_s for r in plain):.3f}",
    )  # fmt: skip
    table.add_row(f"losses differ by {difference(results):.1e} at most")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--grids", type=int, default=16, help="full-size grids, 48 MB each (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="in which both sides take a turn (%(default)s)")
    parser.add_argument("--share", type=float, default=1.0, help="of the steps (%(default)s)")
    arguments = parser.parse_args()
    console = Console(width=140)
    console.print(f"{load()}, {available_bytes() / 1e9:.0f} GB of memory free")
    with tempfile.TemporaryDirectory(prefix="to") as name:
        folder = Path(name)
        shards = made(folder, arguments.grids)
        for model in arguments.models:
            asked = work(CASES[model], shards, arguments.grids, arguments.share)
            results: dict[str, list[Result]] = {side: [] for side in SIDES}
            for number in range(arguments.rounds):
                for side in SIDES if number % 2 == 0 else reversed(SIDES):
                    with console.status(f"{model}: {SIDES[side]}, round {number + 1}"):
                        results[side].append(measure(side, asked, folder))
            console.print(compared(f"{model}, batches of {asked.batch_size}, one worker: seconds a step", results))
    console.print(load())


if __name__ == "__main__":
    main()
