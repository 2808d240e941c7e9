"""What losing machines costs: a pretraining on isolated hosts of this machine goes through one trouble after another.

python tests/benchmarks/losses.py                    all of them, half an hour on two cores; needs root (see tests/hosts.py)
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
from losing import ELASTIC, OFF_FOR_LONG, TROUBLES, suffer, undisturbed, write_data


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = TROUBLES | OFF_FOR_LONG
    parser.add_argument("troubles", nargs="*", help=", ".join(known))
    parser.add_argument("--epochs", type=int, default=90, help="of six steps; it must last through all troubles")
    arguments = parser.parse_args()
    chosen = arguments.troubles or list(known)
    if unknown := set(chosen) - set(known):
        parser.error(f"no trouble {', '.join(unknown)}; there are {', '.join(known)}")
    if reason := why_not():
        parser.error(reason)
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(title="A pretraining with a worker on each of two hosts")
    for column in ("what happened", "no step for, s", "steps repeated", "jobs submitted"):
        table.add_column(column, justify="left" if column == "what happened" else "right")
    said, failed = [], False
    with tempfile.TemporaryDirectory() as folder, launched_cluster(Path(folder)) as cluster:
        whole = undisturbed(cluster, write_data(cluster.shared / "shards"), arguments.epochs)
        for name, troubles, overrides in (("two workers", TROUBLES, ()), ("one or two", OFF_FOR_LONG, (ELASTIC,))):
            cluster.await_nodes(2)
            if not (wanted := {key: trouble for key, trouble in troubles.items() if key in chosen}):
                continue
            try:
                seen = suffer(cluster, whole, wanted, *overrides)
            except AssertionError as error:
                said.append(f"{name}: did not end well: {error}")
                failed = True
                continue
            for row in seen.rows:
                table.add_row(row.what, f"{row.stood_still_s:.0f}", str(row.repeated), str(row.jobs))
            said.append(
                f"{name}, after all of it: samples lost {seen.samples_lost}, metrics lost {seen.metrics_lost}, runs left "
                f"RUNNING {seen.left_running}; weights differ by {seen.weights_differ:g} from those of a run left alone"
            )
    console.print(table)
    for line in said:
        console.print(line, highlight=False, markup=False)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
