"""`copernicus plan` beside what is measured: reading, the CPU smoke run's steps, bytes read, checkpoint size.

python tests/benchmarks/plan_accuracy.py [--epochs 60]      about five minutes on two idle cores, 1 GB in a temporary folder

Reading: processor time of one thread for grids of four sizes in the page cache, and the constants that a line through the
largest and the smallest gives. The run: experiments/pretrain_base_smoke.yaml with more epochs, so that start-up does not
count; its steps by MLflow's clock from the second fifth on, beside the processor time of all its processes, which other work
on the machine disturbs less; predicted by the constants (``--gpu cpu``) and after measuring this machine (``--gpu here``).
Linux only.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from reading.made import PUBLISHED, SMALL, Layout, make_shards
from reading.measure import usage
from rich.console import Console
from rich.table import Table

from copernicus.datasets.index import index_shards
from copernicus.datasets.sensors import SENSORS
from copernicus.datasets.slices import DrawReader
from copernicus.platform.experiment import load_experiment
from copernicus.platform.measured import READ_MB_S, Constant
from copernicus.platform.plan import Cluster, PretrainPlan, Rate, plan_pretrain, read_seconds
from copernicus.platform.plan_here import measure_here
from copernicus.platform.schema import Experiment

SMOKE = Path(__file__).resolve().parents[2] / "experiments" / "pretrain_base_smoke.yaml"
_NAMES = tuple(SENSORS)
HALF = Layout(4, PUBLISHED.dates, {n: s // 2 for n, s in PUBLISHED.stored.items()}, {n: s // 2 if n not in ("dem", *_NAMES[3:7]) else s for n, s in PUBLISHED.crop.items()} | {"dem": 448} | dict.fromkeys(_NAMES[3:7], 12))  # fmt: skip
TINY = Layout(1, dict.fromkeys(_NAMES, 2), {n: 28 if n.startswith("s5p") else 80 for n in _NAMES} | {"dem": 240}, {n: 28 if n.startswith("s5p") else 64 for n in _NAMES} | {"s3_olci": 32, "dem": 192})  # fmt: skip
console = Console(width=140)


def reading(folder: Path, seconds: float) -> None:
    table = Table(title="Reading, cropping and collating a sample, one thread, ms of processor time")
    for name in ("grids", "MB a row", "MB read", "measured", "predicted", "ratio"):
        table.add_column(name, justify="left" if name == "grids" else "right")
    found: list[tuple[float, float]] = []
    for name, layout in (
        ("published sizes", PUBLISHED),
        ("half", HALF),
        ("the smoke run's", TINY),
        ("one token", SMALL),
    ):
        index = index_shards(make_shards(folder / name.replace(" ", ""), layout, 8, 4))
        reader = DrawReader(tuple(SENSORS.values()), layout.crop)
        grids = list(index)
        for epoch in range(2):
            reader.batch([(grid, epoch, 0) for grid in grids])
        samples, epoch, spent, before = 0, 2, 0.0, read_bytes()
        while spent < seconds:
            started = time.process_time()
            reader.batch([(grid, epoch, 0) for grid in grids])
            spent += time.process_time() - started
            samples, epoch = samples + len(grids), epoch + 1
        read = (read_bytes() - before) / samples
        measured, predicted = spent / samples * 1e3, read_seconds(reader.row_bytes) * 1e3
        found.append((reader.row_bytes / 1e6, measured))
        table.add_row(
            name, f"{reader.row_bytes / 1e6:.2f}", f"{read / 1e6:.2f}", f"{measured:.1f}", f"{predicted:.1f}", f"{predicted / measured:.2f}"
        )  # fmt: skip
    slope = (found[0][1] - found[-1][1]) / (found[0][0] - found[-1][0])
    table.caption = f"here: {found[0][1] - slope * found[0][0]:.2f} ms and {slope:.2f} ms for each MB"
    console.print(table)


def read_bytes() -> int:
    return int(Path("/proc/self/io").read_text().split()[1])


@dataclass(frozen=True)
class Ran:
    """Of a step: seconds by the clock and of processors; ``checkpoint``: bytes."""

    step_s: float
    cpu_s: float
    checkpoint: int


def run_smoke(folder: Path, overrides: list[str]) -> Ran:
    command = [sys.executable, "-m", "copernicus.platform.cli", "run", str(SMOKE), *overrides]
    watched: list[tuple[float, float]] = []
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        over = threading.Event()

        def watch() -> None:
            while not over.wait(1.0):
                watched.append((time.time(), usage(process.pid).cpu_s))

        thread = threading.Thread(target=watch)
        thread.start()
        out, _ = process.communicate()
        over.set()
        thread.join()
    if process.returncode:
        raise RuntimeError(out)
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "copernicus"]
    for found in client.search_runs([experiment.experiment_id]):
        rates = client.get_metric_history(found.info.run_id, "train/samples_per_s")
        if rates:
            break
    batch = 8
    # The rate is of all steps so far: its inverse gives the time since the first.
    at = {rate.step: (rate.step * batch / rate.value, rate.timestamp / 1e3) for rate in rates}
    first, last = max(at) // 5, max(at) - 1
    steps = last - first
    cpu = np.interp([at[first][1], at[last][1]], *zip(*watched, strict=True))
    (checkpoint,) = sorted(folder.glob("runs/*/pretrain/checkpoint_*/checkpoint.pt"))[-1:]
    return Ran((at[last][0] - at[first][0]) / steps, float(cpu[1] - cpu[0]) / steps, checkpoint.stat().st_size)


def planned(experiment: Experiment, rate: Rate | None) -> PretrainPlan:
    settings = experiment.pretrain
    assert settings is not None
    return plan_pretrain(
        experiment,
        settings,
        Cluster("cpu", settings.workers, settings.workers, READ_MB_S, Constant(10, "", ""), rate=rate),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=60, help="of the smoke run (%(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="of each reading rate (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="pa") as name:
        folder = Path(name)
        reading(folder / "reading", arguments.seconds)
        # One evaluation and one checkpoint, at the end: neither belongs to a step.
        seldom = [f"pretrain.{key}={arguments.epochs}" for key in ("epochs", "val_every", "checkpoint_every")]
        overrides = [f"miniature.out={folder}/miniature", *seldom, "pretrain.checkpoint_minutes=600"]
        with console.status("the smoke run"):
            ran = run_smoke(folder, overrides)
        experiment = load_experiment(SMOKE, overrides)
        assert experiment.pretrain is not None
        constants, here = planned(experiment, None), planned(experiment, measure_here(experiment.pretrain, 4))
        index = index_shards(str(folder / "miniature" / "pretrain"))
        reader = DrawReader(
            tuple(SENSORS.values()), {s.name: experiment.pretrain.image_size[s.name] for s in SENSORS.values()}, 0
        )
        before = read_bytes()
        for epoch in range(3):
            reader.batch([(grid, epoch, 0) for grid in index])
        read = (read_bytes() - before) / 3 / len(index)
    cpus = experiment.pretrain.workers * experiment.pretrain.cpus_per_worker + experiment.pretrain.data_cpus
    table = Table(title="The CPU smoke run, two workers and one CPU for reading on two cores")
    for column in ("what", "measured", "predicted", "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, measured, predicted in (
        ("processor ms a step, --gpu here", ran.cpu_s * 1e3, here.step_s * cpus * 1e3),
        ("processor ms a step, --gpu cpu", ran.cpu_s * 1e3, constants.step_s * cpus * 1e3),
        ("ms a step, --gpu here", ran.step_s * 1e3, here.step_s * 1e3),
        ("ms a step, --gpu cpu", ran.step_s * 1e3, constants.step_s * 1e3),
        ("kB read a sample", read / 1e3, constants.data.sample_bytes / 1e3),
        ("kB of a checkpoint", ran.checkpoint / 1e3, constants.size.checkpoint_bytes / 1e3),
    ):
        table.add_row(what, f"{measured:,.1f}", f"{predicted:,.1f}", f"{predicted / measured:.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
