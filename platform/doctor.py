"""``copernicus doctor``: looks at this machine or at a cluster before work is entrusted to it, and prints a table.

What is judged is in `doctor_checks.py`, what runs where Ray's driver is in `doctor_cluster.py`, what runs on every node in
`doctor_nodes.py`. Here: the client's own checks, the start of the others, and the table.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import secrets
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue
from typing import TypeAlias
from urllib.parse import urlsplit

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from copernicus.datasets.sensors import InputError
from copernicus.platform import doctor_checks as checks
from copernicus.platform.cluster import JobServer, JobServerLost, connect, how_it_ended
from copernicus.platform.doctor_checks import FAIL, OK, UNKNOWN, WARN, Finding
from copernicus.platform.doctor_cluster import MARK
from copernicus.platform.doctor_nodes import answer_date, token_file, versions
from copernicus.platform.doctor_services import check_job_api
from copernicus.platform.experiment import load_experiment
from copernicus.platform.following import follow
from copernicus.platform.secrets import find_secrets
from copernicus.platform.shipping import EXPERIMENT, pack
from copernicus.platform.submit import Where
from copernicus.platform.tracking import git_commit, user_name

Lines: TypeAlias = "Queue[str | None]"
"""Of the other side's output; None: it has ended."""
DEADLINE_S = 300.0
"""For one check and for the start of Ray; the longest limits of single checks lie well below."""
START_S = 60.0
"""How long a job server may take until it accepts a job."""
COLOURS = {OK: "green", WARN: "yellow", FAIL: "bold red", UNKNOWN: "yellow"}


@dataclass
class Reader:
    """What the cluster's side has printed so far: findings, versions, the check that it is making, the last other lines."""

    on_check: Callable[[str], None]
    check: str = "start"
    done: bool = False
    hung: bool = False
    versions: dict[str, str] | None = None
    others: deque[str] = dataclasses.field(default_factory=lambda: deque(maxlen=20))

    def read(self, line: str) -> Finding | None:
        """A finding, if this line of its output or of a job's log holds one."""
        _, mark, text = line.partition(MARK)
        if not mark:
            self.others.append(line)
            return None
        try:
            told = json.loads(text)
        except ValueError:
            return None
        self.done = self.done or told.get("done", False)
        self.versions = told.get("versions", self.versions)
        if "now" in told:
            self.check = told["now"]
            self.on_check(self.check)
        return Finding(**told["finding"]) if "finding" in told else None


def doctor_command(
    experiment: Path | None,
    overrides: Sequence[str],
    where: Where,
    storage: str | None,
    tracking: str | None,
    console: Console,
) -> int:
    """Make all checks, print them as a table, and return the exit code: 0, or 1 where something fails.

    Raises:
        InputError: the experiment or an option is wrong.
    """
    if where == Where() and os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        where = Where(address=os.environ["RAY_ADDRESS"])
    remote = where != Where()
    if experiment is not None:
        load_experiment(experiment, overrides, here=not remote)
    elif overrides:
        raise InputError(f"{overrides[0]}: overrides are of an experiment: give its YAML first")
    if storage is not None and not os.path.isabs(storage):
        raise InputError(f"--storage {storage}: give the absolute path of the folder that all nodes share")
    if remote and tracking is not None and find_secrets(tracking):
        raise InputError(
            "--tracking: holds a password, which a job would show; set it on the head (MLFLOW_TRACKING_...)"
        )
    if where.cluster is not None and where.address is not None:
        raise InputError("give --cluster or --address, not both")
    if where.cluster is not None and not where.cluster.is_file():
        raise InputError(f"--cluster {where.cluster}: no such file; give the one that `ray up` was given")
    options = [] if storage is None else ["--storage", storage]
    options += [] if tracking is None else ["--tracking", tracking]
    with console.status("starting") as status:

        def on_check(check: str) -> None:
            status.update(f"checking: {escape(check)}")

        if remote:
            findings = list(run_there(where, experiment, [*options, *overrides], on_check))
        else:
            named = [] if experiment is None else ["--experiment", str(experiment)]
            findings = list(run_here([*named, *options, *overrides], on_check))
    print_table(findings, console)
    return checks.exit_code(findings)


def run_here(
    arguments: Sequence[str], on_check: Callable[[str], None], deadline: float = DEADLINE_S
) -> Iterator[Finding]:
    """The cluster's side as a process on this machine. One that is silent for ``deadline`` seconds is ended."""
    reader = Reader(on_check)
    command = [sys.executable, "-m", "copernicus.platform.doctor_cluster", *arguments]
    with (
        tempfile.TemporaryFile("w+") as errors,
        _ended(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)) as process,
    ):
        lines: Lines = Queue()

        def pump() -> None:
            for line in process.stdout or ():
                lines.put(line)
            lines.put(None)

        threading.Thread(target=pump, daemon=True).start()
        yield from _findings(lines, reader, deadline)
        if not reader.done and not reader.hung:
            process.wait()
            errors.seek(0)
            yield broken(reader.check, errors.read(), f"ended with exit code {process.returncode}")


def run_there(
    where: Where,
    experiment: Path | None,
    arguments: Sequence[str],
    on_check: Callable[[str], None],
    deadline: float = DEADLINE_S,
) -> Iterator[Finding]:
    """What this client sees of a cluster, then the cluster's side as a job on its head."""
    in_environment = bool(os.environ.get("RAY_AUTH_TOKEN"))
    token = checks.judge_token_file(token_file(), in_environment)
    yield dataclasses.replace(token, name="client's token file")
    on_check("the job server")
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(connect(where.address, where.cluster))
        except InputError as error:
            yield Finding("job server", FAIL, str(error), "is the head up, the address right, the token its own?")
            return
        yield from client_findings(server.address, server.local)
        on_check("the start of a job")
        try:
            yield from _job(server, experiment, arguments, Reader(on_check), deadline)
        except (InputError, JobServerLost) as error:
            yield Finding("job server", FAIL, str(error), "see the dashboard, or its log on the head (dashboard.log)")


def client_findings(address: str, local: bool) -> Iterator[Finding]:
    """What can be seen from here of a job server."""
    yield check_job_api("job API from here", address, "/api/jobs/", beyond=not local)
    if not local and urlsplit(address).scheme == "http":
        yield Finding(
            "way to the head", WARN, f"{address}: the token goes there as plain text",
            "--cluster CLUSTER.yaml goes through SSH; or `ssh -L 8265:127.0.0.1:8265 HEAD`, or https",
        )  # fmt: skip
    try:
        offset, uncertainty = server_clock(address)
    except (OSError, ValueError) as error:
        yield Finding(
            "client's clock", UNKNOWN, f"{address} does not tell the time: {error}", "compare `date` there and here"
        )
    else:
        yield checks.judge_clock("client's clock", -offset, uncertainty)


def server_clock(url: str) -> tuple[float, float]:
    """(seconds that an HTTP server's clock is ahead of ours, uncertainty), by the date of its answer, which leaves the
    fraction of the second out (RFC 9110, section 6.6.1)."""
    offset, way = checks.clock_offset(lambda: answer_date(url) + 0.5, time.time)
    return offset, way + 0.5


def _job(
    server: JobServer, experiment: Path | None, arguments: Sequence[str], reader: Reader, deadline: float
) -> Iterator[Finding]:
    parcel = pack(experiment, git_commit())
    server.upload(parcel)
    name = f"doctor-{secrets.token_hex(4)}"
    metadata = {"kind": "doctor", "user": user_name()}
    command = entrypoint(arguments, experiment is not None)
    end = time.monotonic() + START_S
    while True:
        try:
            server.submit(name, command, {"working_dir": parcel.uri}, metadata)
            break
        except JobServerLost:  # a head that has just started has no agent yet to run jobs
            if time.monotonic() > end:
                raise
            time.sleep(2)
    lines: Lines = Queue()
    ended: list[str] = []

    def write(text: str) -> None:
        for line in text.splitlines():
            lines.put(line)

    def pump() -> None:
        try:
            job = follow(server, name, write, lambda text: None)
            ended.append(how_it_ended(job))
        except (InputError, JobServerLost) as error:
            ended.append(str(error))
        lines.put(None)

    threading.Thread(target=pump, daemon=True).start()
    try:
        yield from _findings(lines, reader, deadline)
        if reader.versions is not None:
            yield checks.check_client_versions(versions(), reader.versions)
        if not reader.done and not reader.hung:
            yield broken(reader.check, "\n".join(reader.others), ended[0].rstrip("."))
    finally:
        if not ended:
            with contextlib.suppress(InputError, JobServerLost):
                server.stop(name)


def entrypoint(arguments: Sequence[str], with_experiment: bool) -> str:
    """The shell command of the doctor's job: in the shared folder, as that of `copernicus submit`."""
    shipped = f'--experiment "$JOB/{EXPERIMENT}" ' if with_experiment else ""
    return "; ".join(
        [
            "JOB=$PWD",
            '[ ! -d "$COPERNICUS_STORAGE" ] || cd "$COPERNICUS_STORAGE"',
            "export PYTHONSAFEPATH=1",
            f"exec python -m copernicus.platform.doctor_cluster {shipped}{shlex.join(arguments)}".rstrip(),
        ]
    )


def _findings(lines: Lines, reader: Reader, deadline: float) -> Iterator[Finding]:
    """Until the other side ends, or is silent for so long."""
    while True:
        try:
            line = lines.get(timeout=deadline)
        except Empty:
            reader.hung = True
            yield hung(reader.check, deadline)
            return
        if line is None:
            return
        if (finding := reader.read(line)) is not None:
            yield finding


def hung(check: str, seconds: float) -> Finding:
    return Finding(
        check,
        UNKNOWN,
        f"no answer within {seconds:g} s; the checks after it were not made",
        "look at it by hand, then again",
    )


def broken(check: str, said: str, how: str) -> Finding:
    """The cluster's side ended by itself."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return Finding(
        check, FAIL, f"the check ended with {how}: {lines[-1][:300] if lines else 'it said nothing'}", "see Ray's log"
    )


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """The process is gone at the end; what Ray it started goes with it."""
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


def print_table(findings: Sequence[Finding], console: Console) -> None:
    """check | status | what was found | what to do."""
    table = Table("check", "status", "found", "what to do", box=None, pad_edge=False)
    for finding in findings:
        colour = COLOURS.get(finding.status, "")
        table.add_row(
            escape(finding.name), f"[{colour}]{escape(finding.status)}[/]", escape(finding.found), escape(finding.todo)
        )
    console.print(table, highlight=False)
    count = {status: sum(finding.status == status for finding in findings) for status in (OK, WARN, UNKNOWN, FAIL)}
    console.print(
        f"\n{count[OK]} ok, {count[WARN] + count[UNKNOWN]} to look at ({count[UNKNOWN]} of them unknown), {count[FAIL]} failed",
        highlight=False,
    )
