"""The commands that run experiments on a cluster: submit, jobs, logs, stop."""

from __future__ import annotations

import contextlib
import re
import sys
import threading
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from copernicus.datasets.sensors import InputError
from copernicus.platform.cluster import (
    ENDED,
    STOP_GRACE_S,
    JobServer,
    JobServerLost,
    connect,
    entrypoint,
    exit_code,
    how_it_ended,
)
from copernicus.platform.experiment import load_experiment
from copernicus.platform.following import Lines, follow
from copernicus.platform.progress import spell_time
from copernicus.platform.schema import Experiment
from copernicus.platform.shipping import pack
from copernicus.platform.tracking import TRAINING, git_commit, user_name

PATHS = re.compile(
    r"sweep\.data|pretrain\.(shards|geotiffs|index|language|distill\.teacher)|sweep\.encoders\.[^.]+\.(weights|language)"
)
"""Keys of an experiment whose values may be files."""


@dataclass(frozen=True)
class Where:
    """Which cluster a command means: a `ray up` file, or a job server's address, or neither (`default_address`)."""

    cluster: Path | None = None
    address: str | None = None

    def options(self) -> str:
        """To repeat in another command."""
        if self.cluster is not None:
            return f" --cluster {self.cluster}"
        return f" --address {self.address}" if self.address is not None else ""


def submit_command(
    path: Path,
    overrides: Sequence[str],
    where: Where,
    console: Console,
    detach: bool = False,
    fresh: bool = False,
    storage: str | None = None,
) -> int:
    """Submit an experiment as a job, and follow it; returns its exit code (0 if detached).

    Raises:
        InputError: the experiment is wrong, holds credentials or runs already; the cluster refuses the job.
        JobServerLost: the cluster cannot be reached any more; a job that was submitted goes on.
    """
    from copernicus import __version__

    experiment = load_experiment(path, overrides, here=False)
    if storage is not None and not storage.startswith("/"):
        raise InputError(f"--storage {storage}: give the absolute path of a folder on the cluster's nodes")
    commit = git_commit()
    parcel = pack(path, commit)
    for note in notes(experiment):
        console.print(f"[dim]{note}[/]", soft_wrap=True, highlight=False)
    with connect(where.address, where.cluster) as server:
        name = _free_name(server, experiment, where)
        sent = server.upload(parcel)
        size = f"{len(parcel.content) / 2**20:.1f} MiB {'sent' if sent else 'there already'}"
        metadata = {
            "experiment": experiment.name, "kind": experiment.kind, "fingerprint": experiment.fingerprint,
            "copernicus": __version__, "git_commit": commit, "user": user_name(), "request": uuid.uuid4().hex,
        }  # fmt: skip
        environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_GRACE_S)}
        if storage is not None:
            environment["COPERNICUS_STORAGE"] = storage
        runtime_env = {"working_dir": parcel.uri, "env_vars": environment}
        server.submit(name, entrypoint(overrides, fresh), runtime_env, metadata)
        console.print(f"Submitted [bold]{name}[/] to {server.address} ({size})", soft_wrap=True, highlight=False)
        if detach:
            _hints(name, where, console)
            return 0
        return _follow(server, name, where, console)


def jobs_command(where: Where, console: Console) -> None:
    """Print the cluster's jobs, the latest first."""
    with connect(where.address, where.cluster) as server:
        jobs = server.jobs()
    if not jobs:
        console.print("No jobs yet; `copernicus submit EXPERIMENT.yaml` makes one.", highlight=False)
        return
    table = Table("job", "status", "began", "took", "kind", "user", box=None)
    for job in jobs:
        began, ended = job.get("start_time"), job.get("end_time")
        about = job.get("metadata") or {}
        table.add_row(
            job["submission_id"],
            _status(job),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(began / 1000)) if began else "",
            spell_time((ended or time.time() * 1000) / 1000 - began / 1000) if began else "",
            about.get("kind", ""),
            about.get("user", ""),
        )
    console.print(table)


def logs_command(name: str, where: Where, console: Console, following: bool = False) -> int:
    """Print a job's log so far; with ``following`` until the job ends, whose exit code is then returned."""
    with connect(where.address, where.cluster) as server:
        if following:
            return _follow(server, name, where, console)
        job = server.job(name)
        lines = Lines(_write)
        lines.add(server.log(name))
        lines.close()
    if job["status"] in ENDED:
        console.print(how_it_ended(job), soft_wrap=True, highlight=False, markup=False)
    return 0


def stop_command(name: str, where: Where, console: Console) -> int:
    """Ask a job to end, wait until it has; 1 if it has not within its grace period."""
    with connect(where.address, where.cluster) as server:
        job = server.job(name)
        if job["status"] not in ENDED:
            server.stop(name)
            console.print(f"Stopping {name} (it has {STOP_GRACE_S} s to record where it is) ...", highlight=False)
            deadline = time.monotonic() + STOP_GRACE_S + 15
            while job["status"] not in ENDED and time.monotonic() < deadline:
                time.sleep(0.5)
                job = server.job(name)
    if job["status"] not in ENDED:
        console.print(f"{name} is still {job['status'].lower()}; try again", highlight=False)
        return 1
    console.print(how_it_ended(job), soft_wrap=True, highlight=False, markup=False)
    return 0


def ui_command(cluster: Path, port: int, console: Console) -> None:
    """Keep the page of the MLflow server on a cluster's head open on loopback until interrupted."""
    from copernicus.platform.tunnel import MLFLOW_PORT, open_tunnel

    with open_tunnel(cluster, {MLFLOW_PORT: port}) as ports:
        here = ports[MLFLOW_PORT]
        if here != port:
            console.print(f"Port {port} is taken on this machine.", highlight=False)
        page = f"http://127.0.0.1:{here}/#/experiments?{TRAINING}"
        console.print(f"MLflow of {cluster} at {page} (Ctrl-C ends it)", soft_wrap=True, highlight=False)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def notes(experiment: Experiment) -> list[str]:
    """Files that the experiment names and that are here too: the cluster's are meant, and nothing is uploaded."""
    found = []
    made = Path(experiment.miniature.out).absolute() if experiment.miniature else None
    for key, value in experiment.parameters().items():
        for text in (value if isinstance(value, list | tuple) else [value]) if PATHS.fullmatch(key) else ():
            path = Path(text).absolute()
            if text not in ("none", "pretrain") and path.exists() and made not in (path, *path.parents):
                found.append(f"note: {key} is read on the cluster, not here: {text}")
    return found


def _free_name(server: JobServer, experiment: Experiment, where: Where) -> str:
    stem = f"{experiment.name}-{experiment.fingerprint}"
    taken = [0]
    for job in server.jobs():
        name = job["submission_id"]
        if not (number := re.fullmatch(re.escape(stem) + r"-(\d+)", name)):
            continue
        if job["status"] not in ENDED:
            raise InputError(
                f"this experiment is being run by the job {name}; follow it with `copernicus logs {name} --follow"
                f"{where.options()}`, or end it first with `copernicus stop {name}{where.options()}`"
            )
        taken.append(int(number[1]))
    return f"{stem}-{max(taken) + 1}"


def _follow(server: JobServer, name: str, where: Where, console: Console) -> int:
    def notice(text: str) -> None:
        Console(stderr=True, soft_wrap=True).print(f"[yellow]{text}[/]", highlight=False)

    try:
        job = follow(server, name, _write, notice)
    except KeyboardInterrupt:
        console.print(f"\nThe job {name} goes on.", highlight=False)
        _hints(name, where, console)
        return 130
    except JobServerLost as error:
        raise JobServerLost(
            f"{error}; a job goes on without us: `copernicus logs {name} --follow{where.options()}` follows it again"
        ) from None
    console.print(how_it_ended(job), soft_wrap=True, highlight=False, markup=False)
    if where.cluster is not None:
        console.print(f"Open MLflow: copernicus ui --cluster {where.cluster}", soft_wrap=True, highlight=False)
    return exit_code(job)


def _hints(name: str, where: Where, console: Console) -> None:
    for what, command in (("follow", f"logs {name} --follow"), ("stop", f"stop {name}")):
        console.print(f"{what:<7} copernicus {command}{where.options()}", soft_wrap=True, highlight=False, markup=False)


def _status(job: dict[str, Any]) -> str:
    status = job["status"].lower()
    return f"{status} ({job['driver_exit_code']})" if job.get("driver_exit_code") else status


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
