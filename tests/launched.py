"""A Ray cluster that `ray up` brings up on isolated hosts, and what a user beside it does: submit, wait, look at MLflow."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hosts import Host, Network, isolated_hosts
from test_run import command

TEMPLATE = Path(__file__).resolve().parents[1] / "platform" / "clusters" / "on_premise.yaml"
CPUS = 2
"""Of each node, as Ray counts them."""

READ_NODES = """
import json
from ray.util.state import list_nodes

print(json.dumps([node.node_ip for node in list_nodes() if node.state == "ALIVE"]))
"""
READ_RUNS = """
import json
from mlflow import MlflowClient

client = MlflowClient("http://127.0.0.1:5000")
found = []
for experiment in client.search_experiments():
    for run in client.search_runs([experiment.experiment_id], max_results=1000):
        names = set(run.data.metrics) & {"train/loss", "train/samples_seen", "val/loss", "data/epochs_verified",
                                        "train/workers"}
        history = {n: [(m.step, m.value, m.timestamp) for m in client.get_metric_history(run.info.run_id, n)] for n in names}
        found.append({"id": run.info.run_id, "name": run.info.run_name, "status": run.info.status, "tags": run.data.tags,
                      "parameters": run.data.params, "metrics": run.data.metrics, "history": history})
print(json.dumps(found))
"""


@dataclass(frozen=True)
class TrackedRun:
    """An MLflow run of the server on the head. ``history``: (step, value, milliseconds) of pretraining's metrics."""

    id: str
    name: str
    status: str
    tags: dict[str, str]
    parameters: dict[str, str]
    metrics: dict[str, float]
    history: dict[str, list[tuple[int, float, int]]]


class LaunchedCluster:
    """The first host is the head; ``file`` is what `ray up` was given."""

    def __init__(self, network: Network, file: Path, environment: dict[str, str]):
        self.network, self.file, self.environment = network, file, environment
        self.head: Host = network.hosts[0]
        self.workers: list[Host] = network.hosts[1:]
        self._following: list[subprocess.Popen] = []

    @property
    def shared(self) -> Path:
        """Where jobs run."""
        return self.network.shared

    def client(self, *arguments: str, code: int = 0, timeout: float = 600) -> str:
        """What a command prints to a user beside the cluster, who has its token and its key."""
        done = subprocess.run(
            arguments, cwd=self.file.parent, env=self.environment, stdin=subprocess.DEVNULL, timeout=timeout,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, f"{shlex.join(arguments)}: {done.returncode}\n{done.stdout}"
        return done.stdout

    def ray(self, *arguments: str, code: int = 0) -> str:
        return self.client(sys.executable, "-m", "ray.scripts.scripts", *arguments, code=code)

    def copernicus(self, *arguments: str, code: int = 0) -> str:
        return self.client(*command(*arguments), code=code)

    def submit(self, log: Path, *arguments: str) -> subprocess.Popen:
        """The command that submits an experiment and follows the job to its end; it writes to ``log``."""
        with log.open("ab") as file:
            process = subprocess.Popen(
                command("submit", *arguments, "--cluster", str(self.file)),
                cwd=self.file.parent, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self._following.append(process)
        return process

    def up(self) -> None:
        """And wait until every host is a node of the cluster."""
        self.ray("up", str(self.file), "--yes", "--no-config-cache")
        self.await_nodes(len(self.network.hosts))

    def down(self) -> None:
        for process in self._following:
            process.kill()
            process.wait()
        self.ray("down", str(self.file), "--yes")

    def on_head(self, script: str) -> list[Any]:
        """What a Python script on the head prints in its last line, as JSON.

        Raises:
            AssertionError: it fails.
        """
        command = shlex.join([sys.executable, "-c", script])
        return json.loads(self.head.run(f"RAY_AUTH_MODE=token {command}").stdout.splitlines()[-1])

    def nodes(self) -> list[str]:
        """The addresses of those that Ray takes for alive; none while it does not answer."""
        try:
            return self.on_head(READ_NODES)
        except AssertionError:
            return []

    def await_nodes(self, count: int, seconds: float = 180) -> None:
        end = time.monotonic() + seconds
        while len(found := self.nodes()) != count:
            assert time.monotonic() < end, f"{len(found)} nodes instead of {count}: {found}"
            time.sleep(1)

    def runs(self) -> list[TrackedRun]:
        """All of them, from MLflow on the head."""
        return [TrackedRun(**run) for run in self.on_head(READ_RUNS)]


def environment_of(network: Network) -> Path:
    """Stands for the hosts' virtual environment: this interpreter, and Ray's command, which a virtual environment over
    another one lacks."""
    folder = network.folder / "environment"
    (folder / "bin").mkdir(parents=True)
    for name, runs in (("python", ""), ("ray", " -m ray.scripts.scripts")):
        script = folder / "bin" / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{runs} "$@"\n')
        script.chmod(0o755)
    return folder


def cluster_yaml(network: Network) -> str:
    """The shipped file for hosts of one's own, filled in for these. They share two cores: small stores, and as many CPUs
    for Ray whatever the machine has."""
    head, *workers = network.hosts
    values = {
        "HEAD_IP": head.address,
        "WORKER_IPS": ", ".join(w.address for w in workers),
        "SSH_USER": "root",
        "SSH_KEY": network.key,
        "STORAGE": network.shared,
        "ENVIRONMENT": environment_of(network),
        "DATABASE": "sqlite",
        "ARTIFACTS": head.home / "artifacts",
        "SCRATCH": "/tmp/scratch",
    }
    text = TEMPLATE.read_text().replace("cluster_name: copernicus-on-premise", f"cluster_name: {network.bridge}")
    text = text.replace("ray start", f"ray start --num-cpus={CPUS} --object-store-memory=200000000")
    for name, value in values.items():
        assert f"<{name}>" in text
        text = text.replace(f"<{name}>", str(value))
    left = re.findall("<[A-Z_]+>", re.sub("#.*", "", text))
    assert not left, f"placeholders that this test does not know: {left}"
    return text


@contextlib.contextmanager
def launched_cluster(folder: Path, hosts: int = 2, **options: Any) -> Iterator[LaunchedCluster]:
    """`ray up`, and `ray down` at the end. ``options``: of `isolated_hosts`."""
    with isolated_hosts(folder, hosts, **options) as network:
        client = folder / "client"
        (client / ".ray").mkdir(parents=True)
        (client / "dist").mkdir()  # which would hold the wheel; the hosts have this environment
        token = client / ".ray" / "auth_token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "COPERNICUS_"))}
        environment |= {"HOME": str(client), "TMPDIR": str(client), "RAY_TMPDIR": str(client), "RAY_AUTH_MODE": "token"}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0"}
        file = client / "cluster.yaml"
        file.write_text(cluster_yaml(network))
        cluster = LaunchedCluster(network, file, environment)
        cluster.up()
        try:
            yield cluster
        finally:
            cluster.down()
