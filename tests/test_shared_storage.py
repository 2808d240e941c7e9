"""Nodes that see the same folder, another one, none, or one that they may not write: real ones, in mount namespaces."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import ray.train

from copernicus.platform import pretrain_worker, shared_storage
from copernicus.platform.shared_storage import marked, not_shared, sees


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(shared_storage, "WAIT_S", 0.5)


def test_a_worker_sees_the_mark_or_says_why_not(tmp_path):
    with marked(tmp_path) as token:
        assert sees(tmp_path, token) is None
        other = tmp_path / "other"
        assert "does not exist there" in sees(other, token)
        other.mkdir()
        assert "is another folder there" in sees(other, token)
        other.rmdir()
        assert len(list(tmp_path.iterdir())) == 1  # the mark
    assert list(tmp_path.iterdir()) == []
    assert "is another folder there" in sees(tmp_path, token)  # an old mark is none


@pytest.mark.parametrize(
    ("number", "says"), [(errno.ENOSPC, "is full"), (errno.EDQUOT, "quota"), (errno.EROFS, "read-only")]
)
def test_storage_that_refuses_when_it_is_to_be_certain(tmp_path, monkeypatch, number, says):
    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    with marked(tmp_path) as token:
        monkeypatch.setattr(os, "fsync", refuse)
        assert says in sees(tmp_path, token)
        assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk(tmp_path):
    """A file system of two pages: the mark fits, and nothing beside it."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare(1), for a file system of its own")
    code = f"""
from pathlib import Path
from copernicus.platform.shared_storage import marked, sees
with marked(Path({str(tmp_path)!r})) as token:
    print(sees(Path({str(tmp_path)!r}), token), len(list(Path({str(tmp_path)!r}).iterdir())))
"""
    done = in_namespace(f"mount -t tmpfs -o size=4k none {tmp_path}", [sys.executable, "-c", code])
    assert "is full 1" in done.stdout, done.stdout + done.stderr


def in_namespace(mounts: str, command: list[str]) -> subprocess.CompletedProcess:
    """Runs with other mounts than the rest of this machine."""
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", f'{mounts} || exit 97; exec "$@"', "sh", *command],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if done.returncode == 97 or "unshare" in done.stderr:
        pytest.skip(f"mount namespaces are not allowed here: {done.stderr.strip()}")
    return done


def test_storage_that_is_away_ends_no_run_that_has_a_checkpoint(tmp_path, monkeypatch):
    """It may come back; a folder that was never shared will not."""
    rank = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: rank)
    stopped: list[str] = []
    monkeypatch.setattr(pretrain_worker, "stop_run", lambda mailbox, rank, reason: stopped.append(reason))
    plan = SimpleNamespace(settings=None)
    config = {"plan": plan, "folder": tmp_path / "away", "mailbox": None, "token": "none"}
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: None)
    pretrain_worker.train_worker(config)
    assert "does not exist there; on several nodes" in stopped.pop()
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: "a checkpoint")
    with pytest.raises(OSError, match="does not exist there"):
        pretrain_worker.train_worker(config)
    assert stopped == []


@pytest.mark.chaos
def test_nodes_of_a_cluster(tmp_path):
    import psutil
    import ray
    from ray.cluster_utils import Cluster

    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare(1), for nodes with mounts of their own")
    folder = tmp_path / "storage" / "runs"
    folder.mkdir(parents=True)
    in_namespace(f"mount -t tmpfs none {folder}", ["true"])
    mounts = {
        "another": f"mount -t tmpfs none {folder}",
        "none": f"mount -t tmpfs none {folder.parent}",
        "unwritable": f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}",
        "shared": "true",
    }
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes: list[subprocess.Popen] = []
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        assert not_shared(folder) == not_shared(tmp_path / "absent") == []  # one node: nobody is asked
        for kind, mount in mounts.items():
            start = (
                f"{mount} && exec {sys.executable} -m ray.scripts.scripts start --address={cluster.address} --block "
                f"""--num-cpus=1 --resources='{{"{kind}": 1}}'"""
            )
            nodes.append(
                subprocess.Popen(
                    ["unshare", "--mount", "sh", "-c", start], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
                )
            )
        deadline = time.monotonic() + 240
        while sum(node["Alive"] for node in ray.nodes()) < 1 + len(mounts):
            assert time.monotonic() < deadline, "the nodes did not start"
            time.sleep(0.5)
        problems = not_shared(folder, timeout_s=240)
        assert len(problems) == 3, problems
        for says in ("is another folder there", "does not exist there", "is read-only"):
            assert sum(says in problem for problem in problems) == 1, problems
        [node] = {node["NodeManagerAddress"] for node in ray.nodes()}
        assert all(problem.startswith(f"{node} (") and str(folder) in problem for problem in problems)
        assert list(folder.iterdir()) == []

        @ray.remote(num_cpus=0)
        def contents() -> list[str]:
            return [path.name for path in folder.iterdir()]

        assert ray.get(contents.options(resources={"another": 0.1}).remote()) == []
        [absent] = {problem.split(": ", 1)[1] for problem in not_shared(tmp_path / "absent")}
        assert "does not exist" in absent
    finally:
        ray.shutdown()
        for node in nodes:
            children = psutil.Process(node.pid).children(recursive=True)
            for process in [*children, node]:
                process.kill()
            node.wait()
        cluster.shutdown()
