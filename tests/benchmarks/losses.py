"""What losing machines costs: a pretraining on isolated hosts of this machine goes through one trouble after another.

python tests/benchmarks/losses.py                    all of them, some 20 minutes on two cores; needs root (see tests/hosts.py)
python tests/benchmarks/losses.py worker driver      some
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from hosts import why_not
from launched import launched_cluster
from losing import TROUBLES, suffer, undisturbed, write_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("troubles", nargs="*", help=", ".join(TROUBLES))
    parser.add_argument(
        "--epochs", type=int, default=60, help="length of the pretraining; a trouble comes in its middle"
    )
    arguments = parser.parse_args()
    chosen = arguments.troubles or list(TROUBLES)
    if unknown := set(chosen) - set(TROUBLES):
        parser.error(f"no trouble {', '.join(unknown)}; there are {', '.join(TROUBLES)}")
    if reason := why_not():
        parser.error(reason)
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title="A pretraining with a worker on each of two hosts")
    for column in ("what happened", "to the next step, s", "submitted", "steps repeated", "samples lost", "metrics lost",
                   "runs left RUNNING", "weights differ by"):  # fmt: skip
        table.add_column(column, justify="left" if column == "what happened" else "right")
    with tempfile.TemporaryDirectory() as folder, launched_cluster(Path(folder)) as cluster:
        whole = undisturbed(cluster, write_data(cluster.shared / "shards"), arguments.epochs)
        for key in chosen:
            try:
                seen = suffer(cluster, whole, key)
            except AssertionError as error:
                console.print(f"[red]{key}[/] did not end well: {error}", markup=True, highlight=False)
                table.add_row(TROUBLES[key].what, *["failed"] * 7)
                continue
            table.add_row(
                seen.what, f"{seen.recovered_s:.0f}", str(seen.submitted), str(seen.repeated), str(seen.samples_lost),
                str(seen.metrics_lost), str(seen.left_running), f"{seen.weights_differ:g}",
            )  # fmt: skip
            cluster.await_nodes(2)
    console.print(table)


if __name__ == "__main__":
    main()
