"""What it costs to record trials in MLflow: the time of the one who records, of the thread that replays, and of a search.

python tests/benchmarks/tracking_load.py                     10, 100 and 1,000 trials; some 20 minutes on two cores
python tests/benchmarks/tracking_load.py --trials 10 100     two minutes

A trial is what a sweep records of one: six parameters, ten tags, eight figures and three curves of 50 epochs. "direct" is
a `Run` that is started, filled and ended by the one who records; "spooled" goes by way of `Spool`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from rich.console import Console
from rich.table import Table

from copernicus.datasets.order import generator
from copernicus.platform.spool import Spool
from copernicus.platform.tracking import Run, Tracker

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tracking_server import TrackingServer

EPOCHS = 50
PAGE = 100
"""Runs that MLflow's page asks for at a time."""


def trial(number: int) -> dict[str, Any]:
    rng = generator("tracking load", number)
    task, encoder = f"task_{number % 15}", f"encoder_{number % 3}"
    role = "final" if number % 5 == 0 else "search"
    settings = {"lr": float(rng.uniform(1e-4, 1)), "weight_decay": 0.0, "task": task, "encoder": encoder}
    figures = {f"val/figure_{i}": float(rng.uniform()) for i in range(7)} | {"score": float(rng.uniform())}
    curve = [
        (epoch, {name: float(rng.uniform()) for name in ("train_loss", "val_oa", "lr")}) for epoch in range(EPOCHS)
    ]
    tags = {"kind": "trial", "task": task, "encoder": encoder, "role": role, "protocol": "probe", "seed": number}
    tags |= {"sweep": "load", "sweep_id": "load", "trial_key": f"trial-{number}", "weights": "none"}
    parameters = settings | {"protocol": "probe", "model": "copernicus_fm_base"}
    return {"name": f"trial {number}", "tags": tags, "parameters": parameters, "rows": [(EPOCHS, figures), *curve]}


def direct(tracker: Tracker, parent: Run, count: int) -> list[float]:
    """Seconds of each trial."""
    seconds = []
    for number in range(count):
        record = trial(number)
        started = time.perf_counter()
        with tracker.start(record["name"], record["tags"], parent).ending() as run:
            run.parameters(record["parameters"])
            run.metric_rows(record["rows"][:1])
            run.metric_rows(record["rows"][1:])
        seconds.append(time.perf_counter() - started)
    return seconds


def spooled(tracker: Tracker, parent: Run, count: int, folder: Path) -> tuple[list[float], float]:
    """Seconds of each trial for the one who records, while the thread replays; and seconds until all are replayed."""
    seconds = []
    began = time.perf_counter()
    with Spool(tracker, folder) as spool:
        for number in range(count):
            record = trial(number)
            started = time.perf_counter()
            spool.add_run(f"trial-{number}", parent=parent.id, **record)
            seconds.append(time.perf_counter() - started)
    return seconds, time.perf_counter() - began


def search(uri: str, experiment: str, query: str, order: str) -> float:
    """Median seconds of five first pages."""
    client, seconds = MlflowClient(uri), []
    for _ in range(5):
        started = time.perf_counter()
        found = client.search_runs([experiment], query, max_results=PAGE, order_by=[order])
        seconds.append(time.perf_counter() - started)
        assert found
    return statistics.median(seconds)


def measure(name: str, uri: str, counts: list[int], folder: Path, costs: Table, searches: Table) -> None:
    for count in counts:
        tracker = Tracker(uri, f"direct {count}", folder / "artifacts")
        plain = direct(tracker, tracker.start("sweep", {"kind": "sweep"}), count)
        tracker = Tracker(uri, f"spooled {count}", folder / "artifacts")
        caller, whole = spooled(tracker, tracker.start("sweep", {"kind": "sweep"}), count, folder / f"spool {count}")
        costs.add_row(
            name, str(count), f"{1000 * statistics.mean(plain):.0f}", f"{1000 * max(plain):.0f}",
            f"{1000 * statistics.mean(caller):.1f}", f"{1000 * max(caller):.0f}", f"{1000 * whole / count:.0f}",
        )  # fmt: skip
        asked = {
            "newest": ("", "attributes.start_time DESC"),
            "by score": ("", "metrics.score DESC"),
            "a task's final ones": ("tags.task = 'task_0' and tags.role = 'final'", "metrics.score DESC"),
        }
        row = [f"{1000 * search(uri, tracker.experiment_id, *query):.0f}" for query in asked.values()]
        searches.add_row(name, str(count), *row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[10, 100, 1000])
    counts = parser.parse_args().trials
    costs = Table(title="Recording a trial, ms")
    for column in ("store", "trials", "direct", "longest", "spooled: caller", "longest", "until replayed, each"):
        costs.add_column(column, justify="left" if column == "store" else "right")
    searches = Table(title=f"The first {PAGE} runs of a search, ms")
    for column in ("store", "trials", "newest", "by score", "a task's final ones"):
        searches.add_column(column, justify="left" if column == "store" else "right")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measure("sqlite", f"sqlite:///{folder / 'mlflow.db'}", counts, folder / "sqlite", costs, searches)
        (folder / "server").mkdir()
        with TrackingServer(folder / "server") as server:
            measure("server", server.uri, counts, folder / "server", costs, searches)
    console = Console(width=120)
    console.print(costs, searches)


if __name__ == "__main__":
    main()
