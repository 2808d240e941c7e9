"""Trouble for a cluster in the middle of a pretraining, and what is left of the experiment afterwards.

`TROUBLES` are real: killed processes, cables that are out, full disks. `suffer` runs an experiment through some of them, one
after the other, and counts; tests/test_losses.py asserts what tests/benchmarks/losses.py prints.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
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
    try:
        yield
    finally:
        cluster.workers[0].start()


@contextlib.contextmanager
def host_cut_off(cluster: LaunchedCluster) -> Iterator[None]:
    cluster.workers[0].cut()
    try:
        yield
    finally:
        cluster.workers[0].mend()


@contextlib.contextmanager
def driver_killed(cluster: LaunchedCluster) -> Iterator[None]:
    assert cluster.head.kill(DRIVER)
    yield


@contextlib.contextmanager
def server_silent(cluster: LaunchedCluster) -> Iterator[None]:
    group = "-$(cat ~/copernicus-mlflow/server.pid)"
    cluster.head.run(f"kill -STOP -- {group}")
    try:
        yield
    finally:
        cluster.head.run(f"kill -CONT -- {group}")


@contextlib.contextmanager
def disks_full(cluster: LaunchedCluster) -> Iterator[None]:
    """Of both nodes: only that of rank 0 has checkpoints, and either may be it."""
    for host in cluster.network.hosts:
        host.fill()
    try:
        yield
    finally:
        for host in cluster.network.hosts:
            host.free()


@contextlib.contextmanager
def straggler(cluster: LaunchedCluster) -> Iterator[None]:
    with cluster.workers[0].slow(TRAINER, 0.25):
        yield


@dataclass(frozen=True)
class Trouble:
    """``lasts_s``: how long it is left so. ``submitted_again``: the job may fail, and the experiment goes on as another one.
    That it was felt: ``says``, what the log must tell meanwhile; ``stalls_s``, how long training must at least have stood
    still; ``ends_job``, whether the job must have failed."""

    what: str
    happens: Callable[[LaunchedCluster], AbstractContextManager[None]]
    lasts_s: float = 0.0
    submitted_again: bool = False
    says: str = ""
    stalls_s: float = 0.0
    ends_job: bool = False


TROUBLES = {
    "worker": Trouble("a training process killed", worker_killed, says="its process ended"),
    "raylet": Trouble("a node's raylet killed; the cluster starts it again", raylet_killed, says="failed"),
    "host": Trouble("a host switched off, on again after 20 s", host_off_and_on, 20, says="failed"),
    "cut": Trouble("a host off the network for 60 s", host_cut_off, 60, stalls_s=30),
    "driver": Trouble("the job's driver killed, submitted again", driver_killed, submitted_again=True, ends_job=True),
    "mlflow": Trouble("the MLflow server silent for 120 s", server_silent, 120, says="does not answer"),
    "disk": Trouble(
        "the training nodes' disks full for 30 s", disks_full, 30, submitted_again=True, says="No space left on device"
    ),
    "straggler": Trouble(
        "a training process at a quarter of its speed for 100 s", straggler, 100, says="times as long as the others"
    ),
}
OFF_FOR_LONG = {
    "elastic": Trouble("a host off for 270 s; training goes on with one worker", host_off_and_on, 270, says="failed")
}
ELASTIC = "pretrain.workers=[1,2]"
"""With which a run bears `OFF_FOR_LONG`: the cluster's file gives a silent node up to three minutes."""


@dataclass(frozen=True)
class Row:
    """What a trouble cost. ``stood_still_s``: the longest time without a step of training, repeated or new, as recorded
    (every two seconds). ``repeated``: steps computed a second time. ``jobs``: submitted by then."""

    what: str
    stood_still_s: float
    repeated: int
    jobs: int


@dataclass(frozen=True)
class Outcome:
    """What all troubles of a run came to. Lost: samples trained less often, or more, than asked; steps whose loss is missing
    or there twice. ``workers``: how many trained, at one time or another. Differences: the largest of a weight, and of a
    step's loss, to those of a run that was left alone."""

    rows: list[Row]
    samples_lost: int
    metrics_lost: int
    left_running: int
    workers: set[int]
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

    def saved(self) -> int:
        """How many checkpoints there are."""
        return len(list(self.cluster.shared.glob(f"runs/{self.name}-*/pretrain/checkpoint_2*")))

    def trainers(self) -> set[int]:
        return {p.pid for host in self.cluster.network.hosts if host.on for p in host.processes(TRAINER)}

    def tracked(self) -> TrackedRun:
        (run,) = (r for r in self.cluster.runs() if r.tags.get("experiment") == self.name)
        return run


def undisturbed(cluster: LaunchedCluster, shards: Path, epochs: int) -> Experiment:
    whole = Experiment(cluster, shards, "whole", epochs)
    assert whole.submit().wait(timeout=600) == 0, whole.log.read_text()
    return whole


@dataclass
class _Suffered:
    trouble: Trouble
    began: float
    before: set[int]
    seen: set[int]
    jobs: int = 0


class _Suffering:
    """A run on its way through troubles."""

    def __init__(self, run: Experiment):
        self.run = run
        self.process = run.submit()
        self.met: list[_Suffered] = []

    def wait(self, until: Callable[[], bool], seconds: float) -> bool:
        end = time.monotonic() + seconds
        while not (done := until()) and time.monotonic() < end:
            if self.met:
                self.met[-1].seen |= self.run.trainers()
            time.sleep(0.3)
        return done

    def trains(self) -> None:
        """Wait for four more checkpoints, so that it is further than it was before the last trouble, whatever a run needs
        for it that may be submitted again; or for its end.

        Raises:
            AssertionError: there are none in ten minutes, or it failed.
        """
        enough = self.run.saved() + 4
        while True:
            came = self.wait(lambda: self.process.poll() is not None or self.run.saved() >= enough, 600)
            assert came, f"{self.what()}: no checkpoints in 600 s:\n{self.run.log.read_text()}"
            if self.process.poll() in (None, 0):
                return
            may_fail = bool(self.met) and self.met[-1].trouble.submitted_again
            assert may_fail, f"{self.what()}:\n{self.run.log.read_text()}"
            assert self.run.submitted < 5, f"{self.what()}:\n{self.run.log.read_text()}"
            self.process = self.run.submit()

    def meets(self, trouble: Trouble) -> None:
        text = self.run.log.read_text()
        assert self.process.poll() is None, f"it ended before {trouble.what}; more epochs are needed:\n{text}"
        before = self.run.trainers()
        self.met.append(_Suffered(trouble, time.time(), before, set(before)))
        with trouble.happens(self.run.cluster):
            self.wait(lambda: self.process.poll() == 0, trouble.lasts_s)
        self.trains()
        said = self.run.log.read_text()[len(text) :]
        assert trouble.says in said, f"{trouble.what}: the log does not say {trouble.says!r}:\n{said}"
        self.met[-1].jobs = self.run.submitted
        print(f"{trouble.what}: through it after {time.time() - self.met[-1].began:.0f} s", flush=True)

    def what(self) -> str:
        return self.met[-1].trouble.what if self.met else "undisturbed"


def suffer(cluster: LaunchedCluster, whole: Experiment, troubles: Mapping[str, Trouble], *overrides: str) -> Outcome:
    """Submit an experiment like ``whole``, and let one trouble after the other happen to it.

    Raises:
        AssertionError: a trouble was not felt, the run failed, or it ended before the last of them.
    """
    run = Experiment(cluster, whole.shards, f"lost_{'_'.join(troubles)}", whole.epochs, *overrides)
    suffering = _Suffering(run)
    try:
        suffering.trains()
        for trouble in troubles.values():
            suffering.meets(trouble)
        assert suffering.wait(lambda: suffering.process.poll() is not None, 900), run.log.read_text()
    finally:
        if suffering.process.poll() is None:  # what comes next has the cluster for itself
            suffering.process.kill()
            cluster.head.kill(DRIVER)
    assert suffering.process.returncode == 0, run.log.read_text()
    return outcome(run, whole, suffering.met)


def outcome(run: Experiment, whole: Experiment, met: list[_Suffered]) -> Outcome:
    final, expected = run.final(), whole.final()
    losses = run.tracked().history["train/loss"]
    steps = [step for step, _, _ in losses]
    wanted = range(1, run.epochs * DRAWS * GRIDS // BATCH + 1)
    metrics_lost = len(set(wanted) - set(steps)) + len(steps) - len(set(steps))

    once = Coverage.expected(index_shards(str(run.shards)).keys, DRAWS)
    samples_lost = 0
    for epoch in range(run.epochs):
        count, hashes = final["coverage"].get(epoch, (0, 0))
        samples_lost += abs(count - once[0]) or (once[0] if hashes != once[1] else 0)

    saved = run.checkpoints()
    rows, jobs = [], 1
    for this, following in itertools.zip_longest(met, met[1:]):
        until = following.began if following else float("inf")
        row = cost(this, until, [(step, at / 1000) for step, _, at in losses], saved)
        assert row.stood_still_s >= this.trouble.stalls_s, f"not felt, training went on: {row}"
        assert row.jobs > jobs or not this.trouble.ends_job, f"not felt, the job did not fail: {row}"
        rows.append(row)
        jobs = row.jobs
    weights = zip(expected["model"].values(), final["model"].values(), strict=True)
    weights_differ = torch.stack([(a.double() - b.double()).abs().max() for a, b in weights if a.numel()]).max().item()
    left_alone = {step: value for step, value, _ in whole.tracked().history["train/loss"]}
    losses_differ = torch.tensor([abs(value - left_alone[step]) for step, value, _ in losses]).max().item()
    left_running = sum(r.status == "RUNNING" for r in run.cluster.runs())
    workers = {int(value) for _, value, _ in run.tracked().history["train/workers"]}
    return Outcome(rows, samples_lost, metrics_lost, left_running, workers, weights_differ, losses_differ)


def cost(met: _Suffered, until: float, recorded: list[tuple[int, float]], saved: dict[int, float]) -> Row:
    """Of one trouble: from (step, seconds) of what was recorded and the steps of the checkpoints, with their times."""
    times = sorted({at for _, at in recorded if at < until})
    still, again = max(((b - a, b) for a, b in itertools.pairwise(times) if b > met.began), default=(0.0, float("inf")))
    repeated = 0
    if met.seen - met.before:  # other processes: they began at a checkpoint
        last = max((step for step, at in recorded if at < again), default=0)
        from_step = max((step for step, at in saved.items() if at < again), default=0)
        repeated = max(0, last - from_step)
    return Row(met.trouble.what, still, repeated, met.jobs)
