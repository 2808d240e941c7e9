"""Killing what runs, at random moments: nothing is trained twice, nothing is lost, and the weights end with the same bits."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import psutil
import pytest
import torch
from conftest import make_grid
from test_run import command, final_weights, pretraining

from copernicus.datasets.index import index_shards
from copernicus.datasets.order import Coverage
from copernicus.datasets.shards import write_shards
from copernicus.platform.tracking import Tracker

EPOCHS, DRAWS, GRIDS = 36, 2, 24
FEW = "pretrain.sensors=[s1_grd,s2_toa,s5p_o3]"
"""A step costs a fifth without DEM's many generated weights, and the ranks meet different sensors all the same."""
OFTEN = ("pretrain.val_fraction=0", "pretrain.checkpoint_minutes=0.025", "pretrain.checkpoint_every=1000")
"""A checkpoint every second and a half, and no other: in the middle of epochs, mostly."""
SOON = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
"""A node whose raylet was killed is known as dead after some 15 s, not 60."""


@pytest.fixture(scope="module")
def whole_grids(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    grids = (make_grid(i, ("s2_toa", "s5p_o3") if i % 5 == 2 else ()) for i in range(GRIDS))
    write_shards(grids, folder, grids_per_shard=9)
    return folder


@contextlib.contextmanager
def cluster() -> Iterator:
    """A head without CPUs and one node with two, as processes of this machine."""
    from ray.cluster_utils import Cluster

    with mock.patch.dict(os.environ, SOON):
        nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes.add_node(num_cpus=2)
    try:
        yield nodes
    finally:
        nodes.shutdown()


MORE = (FEW, *OFTEN, "pretrain.blr=0.001")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, whole_grids) -> Path:
    """The folder of a run that nobody stopped, with the settings `MORE`."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with cluster() as nodes:
        whole = Run(folder, pretraining(folder, whole_grids, "whole"), nodes.address, *MORE)
        assert whole.wait() == 0, (folder / "whole.log").read_text()
    assert_each_epoch_was_trained_once(folder, "whole", whole_grids)
    return folder


class Run:
    """A `copernicus run` on that cluster."""

    def __init__(self, folder: Path, yaml: Path, address: str, *overrides: str):
        self.log = open(folder / f"{yaml.stem}.log", "ab")  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            command("run", str(yaml), f"pretrain.epochs={EPOCHS}", *overrides),
            cwd=folder, stdout=self.log, stderr=subprocess.STDOUT, env={**os.environ, "RAY_ADDRESS": address},
        )  # fmt: skip

    def wait(self, seconds: float = 500) -> int:
        code = self.process.wait(timeout=seconds)
        self.log.close()
        return code


def checkpoints(folder: Path, name: str) -> set[str]:
    return {p.name for p in folder.glob(f"runs/{name}-*/pretrain/checkpoint_2*")}


def await_checkpoint(folder: Path, run: Run, before: set[str], seconds: float = 180) -> set[str]:
    """Until a checkpoint is there that was not before."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if now := checkpoints(folder, "broken") - before:
            return now
        assert run.process.poll() is None, (folder / "broken.log").read_text()
        time.sleep(0.05)
    raise AssertionError("no checkpoint came:\n" + (folder / "broken.log").read_text())


def train_workers() -> list[psutil.Process]:
    """This test's own, not those of another that runs beside it."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # gone meanwhile
            if any("RayTrainWorker" in part for part in process.cmdline()):
                found.append(process)
    return found


def assert_each_epoch_was_trained_once(folder: Path, name: str, shards: Path) -> None:
    (result,) = (folder / "runs").glob(f"{name}-*")
    saved = torch.load(json.loads((result / "state.json").read_text())["checkpoint"], weights_only=True)
    expected = Coverage.expected(index_shards(str(shards)).keys, DRAWS)
    assert expected[0] == GRIDS * DRAWS
    assert {epoch: tuple(seen) for epoch, seen in saved["coverage"].items()} == dict.fromkeys(range(EPOCHS), expected)
    assert saved["samples_seen"] == EPOCHS * DRAWS * GRIDS


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(1200)
def test_killed_seven_times_it_ends_with_the_same_bits(tmp_path, whole_grids, undisturbed):
    rng = random.Random(int(time.time()))  # other moments each time
    settings = (*MORE, "pretrain.max_failures=40")  # kills may come before a run is further than it was at the last
    with cluster() as nodes:
        yaml = pretraining(tmp_path, whole_grids, "broken")
        run = Run(tmp_path, yaml, nodes.address, *settings)
        seen: set[str] = set()
        for victim in ("worker", "driver", "raylet", "worker", "driver", "raylet", "worker"):
            seen |= await_checkpoint(tmp_path, run, seen)
            time.sleep(rng.uniform(0, 1))
            if run.process.poll() is not None:
                break  # too fast for one more
            if victim == "worker":
                os.kill(rng.choice(train_workers()).pid, signal.SIGKILL)
            elif victim == "raylet":
                (node,) = nodes.worker_nodes
                raylets = node.all_processes["raylet"]
                os.kill(raylets[0].process.pid, signal.SIGKILL)
                nodes.worker_nodes.remove(node)
                node.kill_all_processes(check_alive=False, allow_graceful=False)
                nodes.add_node(num_cpus=2)
            else:
                run.process.kill()
                assert run.wait() == -signal.SIGKILL
                run = Run(tmp_path, yaml, nodes.address, *settings)
        else:
            victim = "all seven"
        assert run.wait() == 0, (tmp_path / "broken.log").read_text()
    assert victim == "all seven", f"the run ended before the kill of a {victim}: make it longer"
    a, b = final_weights(undisturbed, "whole"), final_weights(tmp_path, "broken")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert_each_epoch_was_trained_once(tmp_path, "broken", whole_grids)


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(900)
def test_another_number_of_workers_goes_on_with_the_next_sample(tmp_path, whole_grids, undisturbed):
    """Two workers, killed; one, killed; two again. Sums over ranks round otherwise, so weights agree to tolerance."""
    with cluster() as nodes:
        yaml = pretraining(tmp_path, whole_grids, "broken")
        seen: set[str] = set()
        for workers in (2, 1):
            run = Run(tmp_path, yaml, nodes.address, *MORE, f"pretrain.workers={workers}")
            seen |= await_checkpoint(tmp_path, run, seen)
            time.sleep(0.5)
            assert run.process.poll() is None
            run.process.kill()
            run.wait()
        run = Run(tmp_path, yaml, nodes.address, *MORE, "pretrain.workers=2")
        assert run.wait() == 0, (tmp_path / "broken.log").read_text()
    a, b = final_weights(undisturbed, "whole"), final_weights(tmp_path, "broken")
    start = {k: v for k, v in a.items() if v.is_floating_point()}
    for name in start:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-4)
    assert_each_epoch_was_trained_once(tmp_path, "broken", whole_grids)


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_an_elastic_run_goes_on_with_the_worker_that_is_left(tmp_path, whole_grids):
    """A worker on each of two nodes, one node killed for good: the other trains the whole batch."""
    settings = (
        FEW,
        "pretrain.workers=[1,2]",
        "pretrain.cpus_per_worker=1.5",
        "pretrain.data_cpus=0.5",
        *OFTEN,
    )
    with cluster() as nodes:
        lost = nodes.add_node(num_cpus=2)
        run = Run(tmp_path, pretraining(tmp_path, whole_grids, "broken"), nodes.address, *settings)
        seen = await_checkpoint(tmp_path, run, set())
        await_checkpoint(tmp_path, run, seen)
        nodes.remove_node(lost, allow_graceful=False)
        assert run.wait() == 0, (tmp_path / "broken.log").read_text()
    assert_each_epoch_was_trained_once(tmp_path, "broken", whole_grids)
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", "copernicus")
    (tracked,) = tracker.client.search_runs([tracker.experiment_id])
    history = tracker.client.get_metric_history(tracked.info.run_id, "train/workers")
    workers = [m.value for m in sorted(history, key=lambda m: m.step)]
    assert sorted(workers, reverse=True) == workers, "two, then one"
    assert set(workers) == {1, 2}
    assert sorted(m.step for m in history) == list(range(1, EPOCHS * DRAWS * GRIDS // 8 + 1))


@pytest.mark.chaos
@pytest.mark.timeout(900)
def test_shared_out_over_two_workers_and_killed_it_ends_with_the_same_bits(tmp_path, whole_grids):
    """FSDP: one worker of two killed, then the driver. Held-out grids, so that evaluation comes before checkpoints."""
    settings = (
        FEW,
        "pretrain.parallel=fsdp",
        "pretrain.epochs=10",
        "pretrain.val_fraction=0.15",
        "pretrain.val_every=2",
        "pretrain.checkpoint_every=2",
    )
    with cluster() as nodes:
        whole = Run(tmp_path, pretraining(tmp_path, whole_grids, "whole"), nodes.address, *settings)
        assert whole.wait() == 0, (tmp_path / "whole.log").read_text()
        yaml = pretraining(tmp_path, whole_grids, "broken")
        run = Run(tmp_path, yaml, nodes.address, *settings)
        seen = await_checkpoint(tmp_path, run, set())
        os.kill(random.choice(train_workers()).pid, signal.SIGKILL)
        seen |= await_checkpoint(tmp_path, run, seen)
        run.process.kill()
        run.wait()
        run = Run(tmp_path, yaml, nodes.address, *settings)
        assert run.wait() == 0, (tmp_path / "broken.log").read_text()
    a, b = final_weights(tmp_path, "whole"), final_weights(tmp_path, "broken")
    assert a.keys() == b.keys()
    assert all(type(a[name]) is torch.Tensor and torch.equal(a[name], b[name]) for name in a)
