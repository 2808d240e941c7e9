"""The head's MLflow server: `mlflow_server.sh` for real, on loopback, with SQLite and with PostgreSQL."""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "platform" / "clusters" / "mlflow_server.sh"
NOBODY = 65534
# As another user, who may yet read what root may, such as a Python in root's home. Without the securebit, access(2) forgets
# capabilities of those who are not root: MLflow's migrations "do not exist" then in an environment below a closed folder.
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--securebits=+no_setuid_fixup"]
AS_NOBODY += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Head:
    """What a head is to the script: a home, a port, a user."""

    def __init__(self, home: Path, user: int | None = None):
        self.home, self.port, self.user = home, free_port(), user
        self.start = [] if user is None else AS_NOBODY
        self.folder = home / "copernicus-mlflow"
        self.programs = home / "bin"
        self.programs.mkdir()
        # A link would not do: an environment's interpreter finds its packages by where it lies.
        (self.programs / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (self.programs / "python").chmod(0o755)

    def run(self, action: str, code: int = 0, **variables: str) -> str:
        environment = {
            "HOME": str(self.home), "PATH": f"{self.programs}:{os.environ['PATH']}",
            "COPERNICUS_MLFLOW_PORT": str(self.port), "COPERNICUS_DATABASE": "sqlite", **variables,
        }  # fmt: skip
        done = subprocess.run(
            [*self.start, "bash", str(SCRIPT), action],
            env=environment, cwd=self.home, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr + self.log()
        return done.stdout + done.stderr

    def log(self) -> str:
        file = self.folder / "mlflow.log"
        return file.read_text() if file.exists() else ""

    def ask(self, path: str, **body: object) -> dict:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/api/2.0/mlflow/{path}",
            json.dumps(body).encode() if body else None,
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def experiments(self) -> set[str]:
        found = self.ask("experiments/search", max_results=100)["experiments"]
        return {e["name"] for e in found}

    def group(self) -> int:
        return int((self.folder / "server.pid").read_text())

    def processes(self) -> list[str]:
        """Command lines of the living processes whose environment names this home."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"HOME={self.home}\0" in (folder / "environ").read_text():
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
        return found


@pytest.fixture
def orphans():
    """Processes that lose their parent become this one's, which can then see them end: not every container's first
    process does."""
    prctl, set_child_subreaper = ctypes.CDLL(None).prctl, 36
    prctl(set_child_subreaper, 1)
    yield
    prctl(set_child_subreaper, 0)


def kill(group: int) -> None:
    os.killpg(group, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-group, 0)


def wait(until, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(OSError, AssertionError):
            if until():
                return
        assert time.monotonic() < end
        time.sleep(0.3)


@pytest.fixture
def head(tmp_path):
    made = Head(tmp_path)
    yield made
    made.run("stop")
    assert made.processes() == []


def test_started_on_loopback_and_left_alone(head):
    assert "does not run" in head.run("status", code=1)
    assert f"runs at http://127.0.0.1:{head.port}" in head.run("start")
    group = head.group()
    assert "runs already" in head.run("start")
    assert head.group() == group, "the same processes"
    assert "Default" in head.experiments()
    listening = subprocess.run(["ss", "-Hltn", f"sport = :{head.port}"], capture_output=True, text=True).stdout
    assert {line.split()[3] for line in listening.splitlines()} == {f"127.0.0.1:{head.port}"}, "loopback only"
    assert (head.folder.stat().st_mode & 0o777) == 0o700
    assert not [p for p in head.folder.iterdir() if p.stat().st_mode & 0o077], "nobody else reads database and logs"


@pytest.mark.slow
def test_killed_it_is_back(orphans, head):
    head.run("start")
    head.ask("experiments/create", name="mine")
    group = head.group()
    # All of MLflow killed, its keeper left: it comes back by itself.
    for child in Path(f"/proc/{group}/task/{group}/children").read_text().split():
        os.kill(int(child), signal.SIGKILL)
    wait(lambda: "mine" in head.experiments() and "starting it again" in head.log())
    # The keeper killed, too: the next `ray up` starts it.
    kill(group)
    head.run("status", code=1)
    head.run("start")
    assert "mine" in head.experiments()


def test_what_is_wrong_is_said_at_once(head, tmp_path):
    uri = tmp_path / "uri"
    assert "COPERNICUS_DATABASE: none of" in head.run("start", code=1, COPERNICUS_DATABASE="oracle")
    assert "no file" in head.run("start", code=1, COPERNICUS_DATABASE=str(uri))
    uri.write_text("postgresql+psycopg2://mlflow:hunter22@127.0.0.1:1/mlflow")
    uri.chmod(0o644)
    assert "chmod 600" in head.run("start", code=1, COPERNICUS_DATABASE=str(uri))
    assert "usage" in head.run("restart", code=1)
    if os.getuid() == 0:
        assert "does not run as root" in head.run("start", code=1, COPERNICUS_DATABASE="postgresql")


def test_a_database_that_is_not_there_fails_the_start_and_its_password_is_nowhere(head, tmp_path):
    pytest.importorskip("psycopg2")
    (uri := tmp_path / "uri").write_text("postgresql+psycopg2://mlflow:hunter22@127.0.0.1:1/mlflow")
    uri.chmod(0o600)
    said = head.run("start", code=1, COPERNICUS_DATABASE=str(uri))
    assert re.search(r"port 1 failed: Connection refused[\s\S]*the database cannot be opened", said), said
    for wrong in ("no-such-kind://mlflow:hunter22@db/mlflow", "://mlflow:hunter22@db"):
        said += head.run("start", code=1, COPERNICUS_DATABASE=wrong)
    assert "hunter22" not in said + head.log()
    assert head.processes() == []


@pytest.mark.slow
def test_other_settings_start_it_anew_and_a_stranger_s_port_is_not_taken(head, tmp_path):
    head.run("start")
    group = head.group()
    assert "runs at" in head.run("start", COPERNICUS_ARTIFACTS=str(tmp_path / "elsewhere"))
    assert head.group() != group
    (tmp_path / "other").mkdir()
    other = Head(tmp_path / "other")
    other.port = head.port
    assert "another server answers" in other.run("start", code=1)


@pytest.mark.slow
@pytest.mark.skipif(
    not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")), reason="no PostgreSQL of the distribution here"
)
def test_postgresql_on_the_head_s_disk(orphans):
    pytest.importorskip("psycopg2")
    user = None
    if os.getuid() == 0:
        user = NOBODY
        if subprocess.run([*AS_NOBODY, sys.executable, "-c", "import psycopg2"], cwd="/").returncode:
            pytest.skip("PostgreSQL does not run as root, and another user cannot run this Python")
    home = Path(tempfile.mkdtemp(prefix="head-", dir="/tmp"))  # a short path, that another user reaches, too
    try:
        head = Head(home, user)
        if user is not None:
            os.chown(home, user, user)
        try:
            postgresql(head)
        finally:
            head.run("stop", COPERNICUS_DATABASE="postgresql")
        assert head.processes() == []
    finally:
        shutil.rmtree(home)


def postgresql(head: Head) -> None:
    database = {"COPERNICUS_DATABASE": "postgresql"}
    (head.folder).mkdir()
    (head.folder / "postgresql.part").mkdir()  # as a start that was cut off leaves it
    if head.user is not None:
        for folder in (head.folder, head.folder / "postgresql.part"):
            os.chown(folder, head.user, head.user)
    assert "made a PostgreSQL database" in head.run("start", **database)
    made = head.ask("experiments/create", name="mine")
    run = head.ask("runs/create", experiment_id=made["experiment_id"])["run"]["info"]
    assert run["artifact_uri"].startswith("mlflow-artifacts:"), "clients send artifacts through the server"
    with urllib.request.urlopen(
        urllib.request.Request(
            f"http://127.0.0.1:{head.port}/api/2.0/mlflow-artifacts/artifacts/{made['experiment_id']}/{run['run_id']}/"
            "artifacts/note.txt", b"kept", {"Content-Type": "application/octet-stream"}, method="PUT",
        ), timeout=60,
    ) as answer:  # fmt: skip
        assert answer.status == 200
    assert [p.read_text() for p in (head.folder / "artifacts").rglob("note.txt")] == ["kept"]
    assert "runs already" in head.run("start", **database)
    postmaster = int((head.folder / "postgresql" / "postmaster.pid").read_text().split()[0])
    assert "listen_addresses=" in (Path("/proc") / str(postmaster) / "cmdline").read_text()
    sockets = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True).stdout
    assert f"pid={postmaster}," not in sockets, "PostgreSQL has no port"
    if os.getuid() == 0:  # peer authentication: another user, even root, is not let in
        done = subprocess.run(
            ["psql", "-h", str(head.folder / "socket"), "-U", "nobody", "mlflow", "-c", "select 1"], capture_output=True, text=True
        )  # fmt: skip
        assert done.returncode != 0
        assert "Peer authentication failed" in done.stderr

    # The host loses power: everything at once, without a word.
    kill(head.group())
    kill(os.getpgid(postmaster))
    wait(lambda: not head.processes())
    assert "runs at" in head.run("start", **database)
    assert "mine" in head.experiments()
    head.run("stop", **database)
    with pytest.raises(urllib.error.URLError):
        head.experiments()
    head.run("start", **database)
    assert "mine" in head.experiments()
