"""A real Ray head with token authentication and its job server, in a temporary folder: ended by its own process ids."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import requests


@dataclass(frozen=True)
class RayHead:
    address: str
    token: str
    storage: Path
    gcs: str

    def environment(self) -> dict[str, str]:
        """Of a client that knows the token."""
        mine = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "COPERNICUS_", "MLFLOW_"))}
        return mine | {"RAY_API_SERVER_ADDRESS": self.address, "RAY_AUTH_TOKEN": self.token, "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextlib.contextmanager
def ray_head(storage: Path | None, extra: dict[str, str] | None = None, cpus: int = 2) -> Iterator[RayHead]:
    """``storage``: COPERNICUS_STORAGE on the head; ``extra``: more of its environment."""
    # A short path: Ray's sockets lie below it, and a socket's path is at most 107 characters long.
    with tempfile.TemporaryDirectory(prefix="rh", dir="/tmp", ignore_cleanup_errors=True) as folder:
        home = Path(folder) / "home"
        (home / ".ray").mkdir(parents=True)
        token = secrets.token_hex(16)
        file = home / ".ray" / "auth_token"
        file.touch(mode=0o600)
        file.write_text(token)
        ports = {
            name: free_port()
            for name in (
                "port", "dashboard-port", "dashboard-agent-listen-port", "dashboard-agent-grpc-port",
                "metrics-export-port", "runtime-env-agent-port", "node-manager-port", "object-manager-port",
                "ray-client-server-port",
            )
        }  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "COPERNICUS_", "MLFLOW_"))}
        environment |= {
            "HOME": str(home), "RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "RAY_raylet_start_wait_time_s": "120",  # a busy machine
            "PATH": f"{Path(sys.executable).parent}:{environment['PATH']}", **(extra or {}),
        }  # fmt: skip
        if storage is not None:
            environment["COPERNICUS_STORAGE"] = str(storage)
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--temp-dir", f"{folder}/ray",
            "--node-ip-address", "127.0.0.1", "--dashboard-host", "127.0.0.1", "--include-dashboard", "true",
            "--num-cpus", str(cpus), "--object-store-memory", str(200 * 2**20), "--disable-usage-stats",
            *(f"--{name}={port}" for name, port in ports.items()),
        ]  # fmt: skip
        with open(f"{folder}/head.log", "w+") as log:
            process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
            )
            family: list[psutil.Process] = []
            try:
                address = f"http://127.0.0.1:{ports['dashboard-port']}"
                deadline = time.monotonic() + 120
                while not _answers(address, token):
                    log.seek(0)
                    assert process.poll() is None, log.read()
                    assert time.monotonic() < deadline, log.read()
                    time.sleep(0.3)
                yield RayHead(address, token, storage or Path(folder), f"127.0.0.1:{ports['port']}")
            finally:
                with contextlib.suppress(psutil.NoSuchProcess):
                    family = psutil.Process(process.pid).children(recursive=True)
                process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                if process.poll() is None:
                    process.kill()
                    process.wait()
                _, left = psutil.wait_procs(family, timeout=5)
                for child in left:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()


def _answers(address: str, token: str) -> bool:
    try:
        headers = {"Authorization": f"Bearer {token}"}
        return requests.get(f"{address}/api/jobs/", headers=headers, timeout=5).status_code == 200
    except requests.RequestException:
        return False
