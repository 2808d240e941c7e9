"""Trouble for a cluster in the middle of a pretraining, and what is left of the experiment afterwards.

`TROUBLES` are real: killed processes, cables that are out, full disks. `suffer` runs an experiment through one of them and
counts; tests/test_losses.py asserts what tests/benchmarks/losses.py prints.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from conftest import make_grid
from launched import LaunchedCluster, TrackedRun
from test_run import pretraining

from copernicus.datasets.index import index_shards
from copernicus.datasets.order import Coverage
from copernicus.datasets.shards import write_shards
from copernicus.platform.objective import CHECKPOINT_FILE

GRIDS, DRAWS, BATCH = 24, 2, 8
TRAINER, DRIVER, RAYLET = "RayTrainWorker", "copernicus.platform.cli run", "raylet/raylet"
"""What command lines of the processes hold."""


@contextlib.contextmanager
def worker_killed(cluster: LaunchedCluster) -> Iterator[None]:
    assert cluster.workers[0].kill(TRAINER)
    yield


@contextlib.contextmanager
def raylet_killed(cluster: LaunchedCluster) -> Iterator[None]:
    assert cluster.workers[0].kill(RAYLET)
    yield


@contextlib.contextmanager
def host_off_and_on(cluster: LaunchedCluster) -> Iterator[None]:
    cluster.workers[0].stop()
    yield
    cluster.workers[0].start()


@contextlib.contextmanager
def host_cut_off(cluster: LaunchedCluster) -> Iterator[None]:
    cluster.workers[0].cut()
    yield
    cluster.workers[0].mend()


@contextlib.contextmanager
def driver_killed(cluster: LaunchedCluster) -> Iterator[None]:
    assert cluster.head.kill(DRIVER)
    yield


@contextlib.contextmanager
def server_silent(cluster: LaunchedCluster) -> Iterator[None]:
    group = "-$(cat ~/copernicus-mlflow/server.pid)"
    cluster.head.run(f"kill -STOP -- {group}")
    yield
    cluster.head.run(f"kill -CONT -- {group}")


@contextlib.contextmanager
def disks_full(cluster: LaunchedCluster) -> Iterator[None]:
    """Of both nodes: only that of rank 0 has checkpoints, and either may be it."""
    for host in cluster.network.hosts:
        host.fill()
    yield
    for host in cluster.network.hosts:
        host.free()


@contextlib.contextmanager
def straggler(cluster: LaunchedCluster) -> Iterator[None]:
    with cluster.workers[0].slow(TRAINER, 0.25):
        yield


@dataclass(frozen=True)
class Trouble:
    """``lasts_s``: how long it is left so. ``submitted_again``: the job may fail, and the experiment goes on as a second one.
    ``overrides``: of the experiment. That it was felt: ``says``, what the log must tell; ``stalls_s``, how long training
    must at least have stood still; ``ends_job``, whether the first job must have failed."""

    what: str
    happens: Callable[[LaunchedCluster], AbstractContextManager[None]]
    lasts_s: float = 0.0
    submitted_again: bool = False
    overrides: tuple[str, ...] = ()
    says: str = ""
    stalls_s: float = 0.0
    ends_job: bool = False


ELASTIC = "pretrain.workers=[1,2]"
TROUBLES = {
    "worker": Trouble("a training process killed", worker_killed, says="failed"),
    "raylet": Trouble("a node's raylet killed; the cluster starts it again", raylet_killed, says="failed"),
    "host": Trouble("a host switched off, on again after 20 s", host_off_and_on, 20, says="failed"),
    "elastic": Trouble(
        "a host off for 90 s; the run goes on with one worker", host_off_and_on, 90, overrides=(ELASTIC,), says="failed"
    ),
    "cut": Trouble("a host off the network for 60 s", host_cut_off, 60, stalls_s=30),
    "driver": Trouble("the job's driver killed, submitted again", driver_killed, submitted_again=True, ends_job=True),
    "mlflow": Trouble("the MLflow server silent for 120 s", server_silent, 120, says="does not answer"),
    "disk": Trouble(
        "the training nodes' disks full for 30 s", disks_full, 30, submitted_again=True, says="No space left on device"
    ),
    "straggler": Trouble(
        "a training process at a quarter of its speed for 150 s", straggler, 150, says="times as long as the others"
    ),
}


@dataclass(frozen=True)
class Outcome:
    """``recovered_s``: from the begin of the trouble to the first step of training after it, repeated or new, as recorded
    (every two seconds). ``repeated``: steps computed a second time. Lost: samples trained less often, or more, than asked;
    steps whose loss is missing or there twice. Differences: the largest of a weight, and of a step's loss, to those of a
    run that was left alone."""

    what: str
    recovered_s: float
    repeated: int
    samples_lost: int
    metrics_lost: int
    left_running: int
    submitted: int
    weights_differ: float
    losses_differ: float


def write_data(folder: Path) -> Path:
    """Shards in the shared folder."""
    write_shards((make_grid(i, ("s2_toa",) if i % 5 == 2 else ()) for i in range(GRIDS)), folder, grids_per_shard=9)
    return folder


class Experiment:
    """A pretraining of ``epochs`` with a checkpoint every few seconds, by a worker on each of two nodes."""

    def __init__(self, cluster: LaunchedCluster, shards: Path, name: str, epochs: int, *overrides: str):
        self.cluster, self.shards, self.name, self.epochs = cluster, shards, name, epochs
        self.yaml = pretraining(cluster.file.parent, shards, name)
        self.overrides = [
            f"pretrain.epochs={epochs}",
            # The fewest parameters: 2 of the 24 million that all sensors and twice the width have, which go over the
            # hosts' network in every step.
            "pretrain.sensors=[s1_grd,s2_toa]",
            "pretrain.model.embed_dim=16",
            "pretrain.model.decoder_embed_dim=16",
            "pretrain.val_fraction=0",
            "pretrain.checkpoint_minutes=0.05",
            "pretrain.checkpoint_every=1000",
            "pretrain.keep_checkpoints=1000",  # all stay, to see from which it went on
            # One worker fits on a node of two CPUs, and the reading beside it.
            "pretrain.cpus_per_worker=1.5",
            "pretrain.data_cpus=0.5",
            *overrides,
        ]
        self.log = cluster.file.parent / f"{name}.log"
        self.submitted = 0

    def submit(self) -> subprocess.Popen:
        """The command that submits it and follows the job to its end."""
        self.submitted += 1
        return self.cluster.submit(self.log, str(self.yaml), *self.overrides)

    def checkpoints(self) -> dict[int, float]:
        """The step of each, and when it was written (seconds)."""
        found = {}
        for path in self.cluster.shared.glob(f"runs/{self.name}-*/pretrain/checkpoint_2*/{CHECKPOINT_FILE}"):
            with contextlib.suppress(Exception):  # half written
                found[torch.load(path, map_location="cpu", weights_only=True)["step"]] = path.stat().st_mtime
        return found

    def final(self) -> dict:
        """The last checkpoint."""
        (state,) = self.cluster.shared.glob(f"runs/{self.name}-*/state.json")
        return torch.load(json.loads(state.read_text())["checkpoint"], map_location="cpu", weights_only=True)

    def await_checkpoints(self, count: int, process: subprocess.Popen, seconds: float = 240) -> None:
        end = time.monotonic() + seconds
        while len(list(self.cluster.shared.glob(f"runs/{self.name}-*/pretrain/checkpoint_2*"))) < count:
            assert process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, f"no {count} checkpoints in {seconds} s:\n{self.log.read_text()}"
            time.sleep(0.2)

    def trainers(self) -> set[int]:
        return {p.pid for host in self.cluster.network.hosts if host.on for p in host.processes(TRAINER)}

    def tracked(self) -> TrackedRun:
        (run,) = (r for r in self.cluster.runs() if r.tags.get("experiment") == self.name)
        return run


def undisturbed(cluster: LaunchedCluster, shards: Path, epochs: int) -> Experiment:
    whole = Experiment(cluster, shards, "whole", epochs)
    assert whole.submit().wait(timeout=600) == 0, whole.log.read_text()
    return whole


def suffer(cluster: LaunchedCluster, whole: Experiment, key: str) -> Outcome:
    """Submit an experiment like ``whole``, let the trouble happen in its middle, and submit it again if it failed.

    Raises:
        AssertionError: it ended before the trouble, or not at all.
    """
    trouble = TROUBLES[key]
    run = Experiment(cluster, whole.shards, f"lost_{key}", whole.epochs, *trouble.overrides)
    process = run.submit()
    run.await_checkpoints(2, process)
    time.sleep(1)
    assert process.poll() is None, f"too short:\n{run.log.read_text()}"
    before, began = run.trainers(), time.time()
    seen: set[int] = set()

    def wait(until: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not until() and time.monotonic() < end:
            seen.update(run.trainers())
            time.sleep(0.3)

    with trouble.happens(cluster):
        left = time.monotonic() + trouble.lasts_s
        wait(lambda: time.monotonic() >= left, trouble.lasts_s)
    while True:
        wait(lambda: process.poll() is not None, 600)  # noqa: B023 (called at once)
        if process.poll() is None:
            process.kill()
            raise AssertionError(f"{trouble.what}: no end in 600 s:\n{run.log.read_text()}")
        if process.returncode == 0 or run.submitted == 1 + trouble.submitted_again:
            break
        process = run.submit()
    log = run.log.read_text()
    assert process.returncode == 0, f"{trouble.what}:\n{log}"
    seen_outcome = outcome(run, whole, trouble, began, restarted=bool(seen - before))
    assert trouble.says in log, f"not told of: {trouble.says}\n{log}"
    assert seen_outcome.recovered_s >= trouble.stalls_s, f"not felt: training went on\n{log}"
    assert run.submitted == 2 or not trouble.ends_job, f"not felt: the job did not fail\n{log}"
    return seen_outcome


def outcome(run: Experiment, whole: Experiment, trouble: Trouble, began: float, restarted: bool) -> Outcome:
    final, expected = run.final(), whole.final()
    tracked = run.tracked()
    losses = tracked.history["train/loss"]
    steps = [step for step, _, _ in losses]
    wanted = range(1, run.epochs * DRAWS * GRIDS // BATCH + 1)
    metrics_lost = len(set(wanted) - set(steps)) + len(steps) - len(set(steps))

    once = Coverage.expected(index_shards(str(run.shards)).keys, DRAWS)
    samples_lost = 0
    for epoch in range(run.epochs):
        count, hashes = final["coverage"].get(epoch, (0, 0))
        samples_lost += abs(count - once[0]) or (once[0] if hashes != once[1] else 0)

    # Figures are recorded every two seconds while training runs: the longest silence after the trouble is the recovery.
    times = sorted({at / 1000 for _, _, at in losses})
    gaps = [(b - a, b) for a, b in itertools.pairwise(times) if b > began]
    again = max(gaps)[1] if gaps else float("nan")
    repeated = 0
    if restarted:
        last = max((step for step, _, at in losses if at / 1000 <= again), default=0)
        from_step = max((step for step, at in run.checkpoints().items() if at <= again), default=0)
        repeated = max(0, last - from_step)
    weights = zip(expected["model"].values(), final["model"].values(), strict=True)
    weights_differ = max((a.double() - b.double()).abs().max().item() for a, b in weights if a.numel())
    undisturbed_losses = {step: value for step, value, _ in whole.tracked().history["train/loss"]}
    losses_differ = max(abs(value - undisturbed_losses.get(step, float("nan"))) for step, value, _ in losses)
    return Outcome(
        trouble.what, again - began, repeated, samples_lost, metrics_lost,
        sum(r.status == "RUNNING" for r in run.cluster.runs()), run.submitted, weights_differ, losses_differ,
    )  # fmt: skip
