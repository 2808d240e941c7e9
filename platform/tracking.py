"""Everything that speaks to MLflow. One process, the driver, owns the store; workers send it their figures.

Runs nest: a parent run for an experiment, below it its pretraining and its sweep, below the sweep its trials.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from copernicus.datasets.sensors import InputError

DEFAULT_PORT = 5000
PARENT_TAG = "mlflow.parentRunId"
TRAINING = (
    "workflowType=machine_learning"  # without it a browser new to the page gets the view made for language models
)
MAX_PARAMETER = 6000  # characters; MLflow's own limit
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"


def quiet() -> None:
    """MLflow's and its migrations' progress lines are noise to an experimenter; warnings and errors stay."""
    for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


def mask(text: str) -> str:
    """A tracking URI, or a message that holds one, without its password."""
    text = re.sub(r"(://[^:/@\s]*:)\S*@", r"\1***@", text)
    return re.sub(r"(password=)[^&\s]*", r"\1***", text)


class Run:
    """One MLflow run, addressed by its id."""

    def __init__(self, tracker: Tracker, run_id: str):
        self.tracker = tracker
        self.id = run_id

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Record parameters. MLflow never changes one: where a resumed run has another value (fewer workers, say), the
        first stays and the new one becomes the tag ``changed.<key>``."""
        from mlflow.entities import Param

        recorded = self.tracker.client.get_run(self.id).data.params
        texts = {k: str(v)[:MAX_PARAMETER] for k, v in values.items()}
        self.tags({f"changed.{k}": v for k, v in texts.items() if recorded.get(k, v) != v})
        params = [Param(k, v) for k, v in texts.items() if k not in recorded]
        for start in range(0, len(params), 100):
            self.tracker.client.log_batch(self.id, params=params[start : start + 100])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.metric_rows([(step, values)])

    def metric_rows(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Record many (step, metrics) at once."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(k, float(v), now, step) for step, values in rows for k, v in values.items()]
        for start in range(0, len(metrics), 1000):
            self.tracker.client.log_batch(self.id, metrics=metrics[start : start + 1000])

    def tags(self, values: Mapping[str, Any]) -> None:
        for key, value in values.items():
            self.tracker.client.set_tag(self.id, key, str(value))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        self.tracker.client.log_artifact(self.id, str(path), folder)

    def text(self, text: str, name: str) -> None:
        self.tracker.client.log_text(self.id, text, name)

    def end(self, status: str = FINISHED) -> None:
        self.tracker.client.set_terminated(self.id, status)

    @contextlib.contextmanager
    def ending(self) -> Iterator[Run]:
        """Ends the run as what happens inside: finished, failed, or (interrupted by the user) killed."""
        try:
            yield self
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or terminated
            self.end(KILLED)
            raise
        except BaseException as error:
            self.tags({"error": f"{type(error).__name__}: {error}"[:500]})
            self.end(FAILED)
            raise
        self.end(FINISHED)


class Tracker:
    """A tracking store and an experiment in it, made when missing.

    Raises:
        InputError: the store cannot be opened or reached; the message masks passwords.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None):
        quiet()
        # A server that is down should be said within seconds, not after minutes of back-off.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        self.uri = uri
        local = uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql")
        try:
            if local:
                _open_database(uri)
            self.client = MlflowClient(uri)
            found = self.client.get_experiment_by_name(experiment)
            if found is None:
                # A store on this machine keeps files under a fixed place; a server decides for itself.
                location = (artifacts or Path("runs/artifacts")).absolute().as_uri() if local else None
                self.experiment_id = self.client.create_experiment(experiment, artifact_location=location)
                self.client.set_experiment_tag(self.experiment_id, "mlflow.experimentKind", "custom_model_development")
            elif found.lifecycle_stage == "deleted":
                raise InputError(
                    f"tracking.experiment: {experiment!r} was deleted in {mask(uri)}; restore it or name another"
                )
            else:
                self.experiment_id = found.experiment_id
        except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
            reason = mask(str(error).strip().splitlines()[0])
            raise InputError(f"tracking.uri: cannot use {mask(uri)}: {reason}") from None

    def start(self, name: str, tags: Mapping[str, Any], parent: Run | None = None, run_id: str | None = None) -> Run:
        """Start a run, or go on with ``run_id`` (an interrupted one that still exists)."""
        if run_id is not None and (run := self.find(run_id)) is not None:
            self.client.update_run(run_id, status="RUNNING")
            return run
        all_tags = {"mlflow.runName": name, "mlflow.user": _user(), "mlflow.source.name": "copernicus"}
        all_tags |= {k: str(v) for k, v in tags.items()}
        if parent is not None:
            all_tags[PARENT_TAG] = parent.id
        return Run(self, self.client.create_run(self.experiment_id, tags=all_tags, run_name=name).info.run_id)

    def find(self, run_id: str) -> Run | None:
        """The run of that id, if it is still there."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return Run(self, run_id) if found.info.lifecycle_stage == "active" else None

    def history(self, run: Run, metric: str) -> list[tuple[int, float]]:
        """All (step, value) of a metric, by step."""
        return sorted((m.step, m.value) for m in self.client.get_metric_history(run.id, metric))

    def last_step(self, run: Run, metric: str) -> int:
        """The last step at which a metric was recorded; -1: never."""
        history = self.history(run, metric)
        return history[-1][0] if history else -1

    @property
    def page(self) -> str:
        """Address of the web page: the server's, or the one that ``copernicus ui`` opens."""
        return mask(self.uri).rstrip("/") if self.uri.startswith("http") else f"http://127.0.0.1:{DEFAULT_PORT}"

    def run_link(self, run: Run) -> str:
        return f"{self.page}/#/experiments/{self.experiment_id}/runs/{run.id}?{TRAINING}"

    def compare_link(self, run_ids: Sequence[str]) -> str:
        """A page that shows these runs side by side; its plot opens on the metric that was recorded first."""
        runs = quote(json.dumps(list(run_ids), separators=(",", ":")), safe="")
        experiments = quote(json.dumps([self.experiment_id]), safe="")
        return f"{self.page}/#/compare-runs?runs={runs}&experiments={experiments}&{TRAINING}"


def _open_database(uri: str) -> None:
    """Fails at once where MLflow would try again for minutes."""
    import sqlalchemy

    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).absolute().parent.mkdir(parents=True, exist_ok=True)
    engine = sqlalchemy.create_engine(uri)
    try:
        sqlalchemy.inspect(engine).get_table_names()
    finally:
        engine.dispose()


def git_commit(folder: Path | None = None) -> str:
    """The commit of the code in use (with ``-dirty`` where it was changed since), or ``unknown`` outside a checkout."""
    where = folder or Path(__file__).resolve().parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(where), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(where), "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return commit + ("-dirty" if changed.strip() else "")


def serve(uri: str, port: int = DEFAULT_PORT) -> int:
    """Serve the store's web page on loopback until interrupted or terminated; returns the server's exit code."""
    if uri.startswith("http"):
        raise InputError(f"{mask(uri)} is a server already: open it in a browser")
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists():
        raise InputError(f"no store {uri.removeprefix('sqlite:///')} here; run an experiment first, or give --uri")
    quiet()  # the server inherits the environment: no usage data leaves, and the page says so
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    # MLflow's job queue would be eight more processes, for what this page does not use, that outlive the server.
    environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    process = subprocess.Popen([*command, "--port", str(port), "--workers", "1"], env=environment)
    # A terminated command would leave the server behind, holding the port.
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.terminate()
        return process.wait()


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return "unknown"
