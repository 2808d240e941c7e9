"""From the command to the first training step, and where the time goes.

python tests/benchmarks/start_latency.py                              `copernicus run` here, four times; about three minutes
RAY_AUTH_MODE=token python tests/benchmarks/start_latency.py --submit http://127.0.0.1:8265   as a job of that cluster

The command runs unchanged, in a folder of its own, beside notes of when it and its workers come to certain places
(starting/sitecustomize.py). The first run also writes the miniature Earth and is not counted. A job's workers must see this
machine's files: a head on this machine, or nodes that share its folders.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from training.load import load

HERE = Path(__file__).resolve().parent
SMOKE = HERE.parents[1] / "experiments" / "pretrain_base_smoke.yaml"

STAGES = (
    ("python starts", "python", "start"),
    ("imports of the command", "load_experiment", "start"),
    ("YAML read and checked (torch for its models)", "load_experiment", "end"),
    ("imports: what runs", "run_experiment", "start"),
    ("MLflow imported, its store opened", "Tracker.__init__", "end"),
    ("miniature Earth found", "make_miniature", "end"),
    ("imports: Ray", "init", "start"),
    ("Ray started, or connected", "init", "end"),
    ("MLflow run started", "Tracker.start", "end"),
    ("imports: Ray Data, Train and pretraining", "pretrain", "start"),
    ("listing of shards", "open_index", "start"),
    ("index", "open_index", "end"),
    ("plan", "DataParallelTrainer.fit", "start"),
    ("worker group started", "train_worker", "start"),
    ("model built", "build_autoencoder", "end"),
    ("moved, joined, optimiser", "Evaluation.__call__", "start"),
    ("held-out loss before the first step", "Evaluation.__call__", "end"),
    ("data stream made", "first batch", "start"),
    ("first batch", "first batch", "end"),
    ("first step", "post", "end"),
)
"""What takes the time until a place is first come to."""

Note = dict[str, Any]


def run_here(yaml: Path, overrides: list[str], folder: Path, environment: dict[str, str]) -> dict[str, float]:
    """Runs the command to its end; seconds of what came before Python: nothing."""
    command = [sys.executable, "-m", "copernicus.platform.cli", "run", str(yaml), "--fresh", *overrides]
    done = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the command failed:\n{done.stdout}\n{done.stderr}")
    return {}


def run_there(
    url: str, yaml: Path, overrides: list[str], folder: Path, environment: dict[str, str]
) -> dict[str, float]:
    """The same command as a job of a cluster; seconds that the cluster's answer to the submission took."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(url)
    command = [sys.executable, "-m", "copernicus.platform.cli", "run", str(yaml), "--fresh", *overrides]
    started = time.time()
    job = client.submit_job(
        entrypoint=f"cd {shlex.quote(str(folder))} && exec {shlex.join(command)}",
        runtime_env={"env_vars": environment},
    )
    accepted = time.time() - started
    while not (status := client.get_job_status(job)).is_terminal():
        time.sleep(0.5)
    if status != JobStatus.SUCCEEDED:
        raise RuntimeError(f"the job ended as {status}:\n{client.get_job_logs(job)}")
    return {"job accepted": accepted}


def first(notes: list[Note], name: str, event: str) -> float | None:
    found = [n["t"] for n in notes if n["name"] == name and n["event"] == event and n.get("step", 1) > 0]
    return min(found, default=None)


def stages(notes: list[Note], started: float, before: dict[str, float]) -> dict[str, float]:
    """Stage -> seconds; a place that was not come to (no miniature, say) is part of the next stage."""
    seconds, reached = dict(before), started + sum(before.values())
    for title, name, event in STAGES:
        if (at := first(notes, name, event)) is not None:
            seconds[title], reached = at - reached, at
    return seconds


def imports(notes: list[Note]) -> dict[tuple[str, str], float]:
    """(module, process) -> seconds of its import, those within it included; of worker processes the slowest."""
    driver = next(n["pid"] for n in notes if n["name"] == "load_experiment")
    found: dict[tuple[str, str], float] = {}
    for n in notes:
        if n["name"].startswith("import "):
            key = n["name"].removeprefix("import "), "command" if n["pid"] == driver else "worker"
            found[key] = max(found.get(key, 0.0), n["seconds"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", type=Path, default=SMOKE, help="a YAML that pretrains (%(default)s)")
    parser.add_argument("overrides", nargs="*", help="as in pretrain.workers=1")
    parser.add_argument("--submit", metavar="URL", help="as a job of this cluster")
    parser.add_argument("--rounds", type=int, default=3, help="that count (%(default)s)")
    arguments = parser.parse_args()
    console = Console(width=140)
    console.print(load())
    yaml, found = arguments.experiment.resolve(), []
    notes: list[Note] = []
    with tempfile.TemporaryDirectory(prefix="sl") as name:
        folder = Path(name)
        for number in range(arguments.rounds + 1):
            marks = folder / f"marks{number}.jsonl"
            environment = {"PYTHONPATH": str(HERE / "starting"), "COPERNICUS_MARKS": str(marks), "OMP_NUM_THREADS": "1"}
            with console.status(f"run {number} of {arguments.rounds}"):
                started = time.time()
                if arguments.submit:
                    before = run_there(arguments.submit, yaml, arguments.overrides, folder, environment)
                else:
                    before = run_here(yaml, arguments.overrides, folder, environment)
                ended = time.time()
            notes = [json.loads(line) for line in marks.read_text().splitlines()]
            if number:
                found.append(stages(notes, started, before))
                found[-1] |= {"command to first step": sum(found[-1].values())}
                found[-1] |= {"command to its end": ended - started}
    title = f"{yaml.name}, {'submitted' if arguments.submit else 'here'}: seconds, {arguments.rounds} runs"
    table = Table(title=title)
    for column in ("what", "median", "least", "most"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for stage in found[-1]:
        seconds = [run[stage] for run in found if stage in run]
        if stage == "command to first step":
            table.add_section()
        table.add_row(stage, *(f"{of(seconds):.2f}" for of in (statistics.median, min, max)))
    console.print(table)
    missing = [title for title, name, event in STAGES if first(notes, name, event) is None]
    if missing:
        console.print(f"not seen, and part of what follows: {', '.join(missing)}")
    table = Table(title="Imports of the last run, seconds, those within it included (of several workers the slowest)")
    for column in ("module", "process", "s"):
        table.add_column(column, justify="left" if column != "s" else "right")
    for (module, process), seconds_ in sorted(imports(notes).items(), key=lambda item: -item[1]):
        table.add_row(module, process, f"{seconds_:.2f}")
    console.print(table)
    console.print(load())


if __name__ == "__main__":
    main()
