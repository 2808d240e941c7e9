"""Jobs on a real Ray head with token authentication."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from ray_head import ray_head

from copernicus.platform.cluster import ENDED, JobServer
from copernicus.platform.shipping import Parcel, pack

pytestmark = pytest.mark.chaos
VERSION = "0.0.0.shipped"
WORKER = (
    "import ray; ray.init(log_to_driver=False, logging_level=50); "
    "f = ray.remote(lambda: (__import__('copernicus').__version__, __import__('copernicus.platform.tracking').platform.tracking.git_commit()));"
    "print('worker', *ray.get(f.remote()))"
)
SWEEP = """
name: mine
kind: sweep
sweep:
  data: ${oc.env:BENCH_FOLDER}
  tasks: [eurosat_s2]
  encoders: {random: {weights: none, model: {name: copernicus_fm_base}}}
"""


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    with ray_head(None) as running:
        yield running


@pytest.fixture
def sweep(tmp_path) -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(SWEEP)
    return file


def copernicus(head, *arguments, **environment):
    command = [sys.executable, "-m", "copernicus.platform.cli", *map(str, arguments)]
    return subprocess.run(
        command, env=head.environment() | environment, capture_output=True, text=True, timeout=300, cwd="/"
    )


def test_without_storage_and_with_wrong_input_a_job_ends_with_2_and_one_message(head, sweep, tmp_path):
    done = copernicus(head, "submit", sweep)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "COPERNICUS_STORAGE is not set on the cluster's head" in done.stdout
    secret = {"AWS_SECRET_ACCESS_KEY": "a-secret-of-mine"}
    done = copernicus(head, "submit", sweep, "--storage", tmp_path, **secret)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the environment variable BENCH_FOLDER is not set" in done.stdout
    assert "Running entrypoint" not in done.stdout
    listed = copernicus(head, "jobs")
    assert listed.stdout.count("failed (2)") == 2
    server = connected(head)
    everything = json.dumps(server.jobs()) + "".join(server.log(job["submission_id"]) for job in server.jobs())
    assert head.token not in everything
    assert "a-secret-of-mine" not in everything
    assert list(tmp_path.iterdir()) == [sweep]  # nothing is left behind


def test_workers_import_the_shipped_package(head, sweep):
    """Not the one that is installed on the cluster, though both are on their path."""
    parcel = pack(sweep, "abc123")
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(parcel.content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            text = old.read(name)
            if name == "copernicus/__init__.py":
                text += f"\n__version__ = {VERSION!r}\n".encode()
            new.writestr(name, text)
    changed = Parcel(buffer.getvalue(), parcel.files)
    server = connected(head)
    server.upload(changed)
    server.submit("worker-1", f'python -c "{WORKER}"', {"working_dir": changed.uri}, {})
    deadline = time.monotonic() + 200
    while server.job("worker-1")["status"] not in ENDED and time.monotonic() < deadline:
        time.sleep(0.5)
    log = server.log("worker-1")
    assert f"worker {VERSION} abc123" in log, log


def connected(head) -> JobServer:
    before = os.environ.get("RAY_AUTH_TOKEN")
    os.environ["RAY_AUTH_TOKEN"] = head.token
    try:
        return JobServer(head.address)
    finally:
        if before is None:
            del os.environ["RAY_AUTH_TOKEN"]
        else:
            os.environ["RAY_AUTH_TOKEN"] = before
