"""``copernicus doctor``: looks at this machine or at a cluster before work is entrusted to it, and prints a table.

What is judged is in `doctor_checks.py`, what runs where Ray's driver is in `doctor_cluster.py`, what runs on every node in
`doctor_nodes.py`. Here: the client's own checks, the start of the others, and the table.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Queue

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from copernicus.datasets.sensors import InputError
from copernicus.platform import doctor_checks as checks
from copernicus.platform.doctor_checks import FAIL, OK, UNKNOWN, WARN, Finding
from copernicus.platform.doctor_cluster import MARK

DEADLINE_S = 300.0
"""For one check and for the start of Ray; the longest limits of single checks lie well below."""
COLOURS = {OK: "green", WARN: "yellow", FAIL: "bold red", UNKNOWN: "yellow"}


@dataclass
class Reader:
    """What the cluster's side has printed so far: findings, versions, the check that it is making."""

    on_check: Callable[[str], None]
    check: str = "start"
    done: bool = False
    versions: dict[str, str] | None = None

    def read(self, line: str) -> Finding | None:
        """A finding, if this line of its output or of a job's log holds one."""
        _, mark, text = line.partition(MARK)
        if not mark:
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
    storage: str | None,
    tracking: str | None,
    console: Console,
) -> int:
    """Make all checks, print them as a table, and return the exit code: 0, or 1 where something fails.

    Raises:
        InputError: the experiment or an option is wrong.
    """
    if experiment is not None:
        from copernicus.platform.experiment import load_experiment

        load_experiment(experiment, overrides)
    elif overrides:
        raise InputError(f"{overrides[0]}: overrides are of an experiment: give its YAML first")
    if storage is not None and not os.path.isabs(storage):
        raise InputError(f"--storage {storage}: give the absolute path of the folder that all nodes share")
    options = [] if experiment is None else ["--experiment", str(experiment)]
    options += [] if storage is None else ["--storage", storage]
    environment = dict(os.environ)
    if tracking is not None:
        options += ["--tracking", tracking]
    with console.status("starting", spinner="dots") as status:
        findings = list(
            run_here([*options, *overrides], lambda check: status.update(f"checking: {escape(check)}"), environment)
        )
    print_table(findings, console)
    return checks.exit_code(findings)


def run_here(
    arguments: Sequence[str], on_check: Callable[[str], None], environment: dict[str, str], deadline: float = DEADLINE_S
) -> Iterator[Finding]:
    """The cluster's side as a process on this machine. One that is silent for ``deadline`` seconds is ended."""
    reader = Reader(on_check)
    command = [sys.executable, "-m", "copernicus.platform.doctor_cluster", *arguments]
    with tempfile.TemporaryFile("w+") as errors, _ended(subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
    )) as process:  # fmt: skip
        lines: Queue[str | None] = Queue()
        assert process.stdout is not None
        threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=deadline)
            except Empty:
                yield hung(reader.check, deadline)
                return
            if line is None:
                break
            if (finding := reader.read(line)) is not None:
                yield finding
        process.wait()
        if not reader.done:
            errors.seek(0)
            yield broken(reader.check, errors.read(), f"exit code {process.returncode}")


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


def _pump(stream: Iterable[str], lines: Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


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
    table = Table("check", "", "found", "what to do", box=None, pad_edge=False)
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
