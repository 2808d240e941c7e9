"""Everything that speaks to MLflow, but for `spool.py` (trials on their way) and `tracking_read.py`. One process, the driver, owns the store; workers send it their figures.

Runs nest: a parent run for an experiment, below it its pretraining and its sweep, below the sweep its trials, which reach
the store by way of `spool.py`. What is written here waits out a store that does not answer.
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from copernicus.datasets.sensors import InputError

DEFAULT_PORT = 5000
PARENT_TAG = "mlflow.parentRunId"
TRAINING = (
    "workflowType=machine_learning"  # without it a browser new to the page gets the view made for language models
)
MAX_PARAMETER, MAX_TAG, MAX_NAME = 6000, 8000, 250  # characters; MLflow's own limits
FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"
PATIENCE_S = 300.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 10.0

logger = logging.getLogger("copernicus.tracking")
T = TypeVar("T")


def quiet() -> None:
    """MLflow's and its migrations' progress lines are noise to an experimenter; warnings and errors stay."""
    for name in ("mlflow", "alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # A line for each run that ends, and on a server one more request to write it.
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


def mask(text: str) -> str:
    """A tracking URI, or a message that holds one, without its password."""
    text = re.sub(r"(://[^:/@\s]*:)\S*@", r"\1***@", text)
    return re.sub(r"(password=)[^&\s]*", r"\1***", text)


def store_errors() -> tuple[type[Exception], ...]:
    """What a call of MLflow's client raises when the store refuses, breaks or does not answer."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import RequestException

    return MlflowException, RequestException


def may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later: no answer, a busy store, a broken one; not a refusal."""
    from mlflow.exceptions import MlflowException
    from requests.exceptions import HTTPError, RequestException

    if isinstance(error, HTTPError):  # raised by transfers of artifacts
        return error.response is None or error.response.status_code >= 500 or error.response.status_code in (408, 429)
    if not isinstance(error, MlflowException):
        return isinstance(error, RequestException)  # the connection
    # MLflow gives these three a status of the server's, though they are about the request.
    if error.error_code in ("INVALID_STATE", "DATA_LOSS", "NOT_IMPLEMENTED"):
        return False
    return error.get_http_status_code() >= 500 or error.get_http_status_code() in (408, 429)


def one_line(error: BaseException) -> str:
    """The first line of a message, without passwords and not endless."""
    return mask((str(error).strip() or type(error).__name__).splitlines()[0])[:300]


def clean_name(name: str) -> str:
    """A parameter's or metric's name as MLflow takes it: letters, digits and ``_-. :/``, 250 characters, a plain path."""
    name = re.sub(r"[^/\w.\- :]", "_", name)[:MAX_NAME]
    parts = [part if part.strip(".") else "_" * max(1, len(part)) for part in name.split("/")]
    return "/".join(parts)


def clean_text(value: Any, most: int) -> str:
    """A value as MLflow takes it: at most ``most`` characters, and none that its databases refuse."""
    return str(value).replace("\0", "")[:most]


class Run:
    """One MLflow run, addressed by its id. Whatever it writes can be written twice without harm, so that each write is
    repeated while the store does not answer (`Tracker.patiently`)."""

    def __init__(self, tracker: Tracker, run_id: str):
        self.tracker = tracker
        self.id = run_id

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Record parameters. MLflow never changes one: where a resumed run has another value (fewer workers, say), the
        first stays and the new one becomes the tag ``changed.<key>``."""
        from mlflow.entities import Param

        client = self.tracker.client
        recorded = self.tracker.patiently(lambda: client.get_run(self.id)).data.params
        texts = {clean_name(k): clean_text(v, MAX_PARAMETER) for k, v in values.items()}
        self.tags({f"changed.{k}": v for k, v in texts.items() if recorded.get(k, v) != v})
        params = [Param(k, v) for k, v in texts.items() if k not in recorded]
        self.tracker.patiently(lambda: client.log_batch(self.id, params=params))

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.metric_rows([(step, values)])

    def metric_rows(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Record many (step, metrics) at once."""
        metrics = as_metrics(rows, int(time.time() * 1000))
        self.tracker.patiently(lambda: self.tracker.client.log_batch(self.id, metrics=metrics))

    def tags(self, values: Mapping[str, Any]) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(clean_name(key), clean_text(value, MAX_TAG)) for key, value in values.items()]
        self.tracker.patiently(lambda: self.tracker.client.log_batch(self.id, tags=tags))

    def artifact(self, path: str | Path, folder: str | None = None) -> None:
        self.tracker.patiently(lambda: self.tracker.client.log_artifact(self.id, str(path), folder))

    def text(self, text: str, name: str) -> None:
        self.tracker.patiently(lambda: self.tracker.client.log_text(self.id, text, name))

    def end(self, status: str = FINISHED) -> None:
        now = int(time.time() * 1000)
        self.tracker.patiently(lambda: self.tracker.client.set_terminated(self.id, status, now))

    @contextlib.contextmanager
    def ending(self) -> Iterator[Run]:
        """Ends the run as what happens inside: finished, failed, or (interrupted by the user) killed."""
        try:
            yield self
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or terminated
            self._end_now(KILLED, {})
            raise
        except BaseException as error:
            self._end_now(FAILED, {"error": f"{type(error).__name__}: {error}"[:500]})
            raise
        self.end(FINISHED)

    def _end_now(self, status: str, tags: Mapping[str, str]) -> None:
        """On the way out: nobody waits for a store that does not answer, and what happened is raised all the same."""
        patience, self.tracker.patience = self.tracker.patience, 0.0
        try:
            self.tags(tags)
            self.end(status)
        except store_errors() as error:
            logger.warning("MLflow's run %s could not be marked %s: %s", self.id, status, one_line(error))
        finally:
            self.tracker.patience = patience


def as_metrics(rows: Sequence[tuple[int, Mapping[str, float]]], at_ms: int) -> list[Any]:
    """MLflow's metrics of (step, values). The time is the caller's: one that is recorded again with the same time, step
    and value is not doubled."""
    from mlflow.entities import Metric

    return [Metric(clean_name(k), float(v), at_ms, step) for step, values in rows for k, v in values.items()]


class Tracker:
    """A tracking store and an experiment in it, made when missing.

    ``patience`` (seconds) is how long a store may be silent, once it was there, before a write fails.

    Raises:
        InputError: the store cannot be opened or reached; the message masks passwords.
    """

    def __init__(self, uri: str, experiment: str, artifacts: Path | None = None, patience: float = PATIENCE_S):
        quiet()
        # MLflow's own retries send a request again whose answer was lost, and so make a run twice: `patiently` and the
        # spool repeat what can be repeated, and look before they make a run again.
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        self.patience = patience
        self._silent_since: float | None = None
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
            raise InputError(f"tracking.uri: cannot use {mask(uri)}: {one_line(error)}") from None

    def patiently(self, call: Callable[[], T]) -> T:
        """What ``call`` gives, repeated while the store does not answer, until that has lasted for ``patience`` seconds.

        An outage is one, however many calls it meets: when it has outlasted the patience, the next call is tried once.
        """
        pause = FIRST_PAUSE_S
        while True:
            try:
                result = call()
            except store_errors() as error:
                if not may_pass(error):
                    raise
                now = time.monotonic()
                # A first failure may be no more than a kept connection that the server has closed: not worth a word.
                if self._silent_since is None:
                    self._silent_since = now
                elif now - self._silent_since > self.patience:
                    raise
                elif pause == 2 * FIRST_PAUSE_S:
                    logger.warning("the tracking server does not answer; trying again for up to %.0f s", self.patience)
                time.sleep(min(pause, self.patience))
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                self._silent_since = None
                return result

    def start(self, name: str, tags: Mapping[str, Any], parent: Run | None = None, run_id: str | None = None) -> Run:
        """Start a run, or go on with ``run_id`` (an interrupted one that still exists)."""
        if run_id is not None and (run := self.find(run_id)) is not None:
            self.patiently(lambda: self.client.update_run(run_id, status="RUNNING"))
            return run
        creation = Creation(self, name, tags, parent.id if parent else None, int(time.time() * 1000))
        return Run(self, self.patiently(creation))

    def find(self, run_id: str) -> Run | None:
        """The run of that id, if it is still there."""
        from mlflow.exceptions import MlflowException

        try:
            found = self.patiently(lambda: self.client.get_run(run_id))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        return Run(self, run_id) if found.info.lifecycle_stage == "active" else None

    def history(self, run: Run, metric: str) -> list[tuple[int, float]]:
        """All (step, value) of a metric, by step."""
        history = self.patiently(lambda: self.client.get_metric_history(run.id, metric))
        return sorted((m.step, m.value) for m in history)

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

    def runs_link(self, search: str, order_by: str = "metrics.`score`", ascending: bool = False) -> str:
        """A page of the runs that ``search`` finds, such as ``tags.task = 'eurosat_s2' and tags.role = 'final'``.

        In the page's own order, by creation, runs are folded into their parents, found or not: hence an order by a metric,
        in which they are a plain list.
        """
        asked = {"searchFilter": search, "orderByKey": order_by, "orderByAsc": str(ascending).lower()}
        query = "&".join(f"{key}={quote(value, safe='')}" for key, value in asked.items())
        return f"{self.page}/#/experiments/{self.experiment_id}/runs?{query}&{TRAINING}"

    def view_link(
        self,
        key: str,
        search: str,
        parameters: Sequence[str] = ("task", "encoder", "lr"),
        metric: str = "score",
        tags: Sequence[str] = ("role", "seed"),
        group_by: Sequence[str] = (),
        chart: bool = False,
    ) -> str:
        """A page of runs made ready, as the page's own "share" makes one: columns of the parameters, tags and the metric,
        runs grouped by parameters if wanted; with ``chart``, parallel coordinates of the parameters and the metric.

        The view is kept in the experiment under ``key``; another of the same key takes its place. A page of MLflow holds
        100 runs, the chart those that the page holds: give a ``search`` that finds no more, or press "Load more".
        """
        section = {"uuid": "sweep", "name": "Sweep", "display": True, "isReordered": False, "deleted": False}
        section |= {"isGenerated": False, "columns": 1, "cardHeight": 340}  # as wide as the page
        coordinates = {
            "type": "PARALLEL", "uuid": "coordinates", "metricSectionId": "sweep", "deleted": False, "isGenerated": False,
            "selectedParams": list(parameters), "selectedMetrics": [metric], "showAllRuns": True, "runsCountToCompare": 10,
        }  # fmt: skip
        columns = [f"params.`{p}`" for p in parameters] + [f"metrics.`{metric}`"] + [f"tags.`{t}`" for t in tags]
        groups = [{"mode": "param", "groupByData": name} for name in group_by]
        state = {
            "searchFilter": search, "orderByKey": f"metrics.`{metric}`", "orderByAsc": False, "startTime": "ALL",
            "lifecycleFilter": "Active", "datasetsFilter": [], "modelVersionFilter": "All Runs",
            "selectedColumns": ["attributes.`Duration`", *columns],
            "groupBy": {"aggregateFunction": "average", "groupByKeys": groups} if groups else None,
            "compareRunSections": [section], "compareRunCharts": [coordinates],
        }  # fmt: skip
        tag = f"mlflow.sharedViewState.{key}"
        self.patiently(lambda: self.client.set_experiment_tag(self.experiment_id, tag, json.dumps(state)))
        mode = "&compareRunsMode=CHART" if chart else ""
        address = f"{self.page}/#/experiments/{self.experiment_id}/runs"
        return f"{address}?viewStateShareKey={quote(key, safe='')}{mode}&{TRAINING}"

    def compare_link(self, run_ids: Sequence[str]) -> str:
        """A page that shows these runs side by side; its plot opens on the metric that was recorded first."""
        runs = quote(json.dumps(list(run_ids), separators=(",", ":")), safe="")
        experiments = quote(json.dumps([self.experiment_id]), safe="")
        return f"{self.page}/#/compare-runs?runs={runs}&experiments={experiments}&{TRAINING}"


class Creation:
    """Makes one run, however often it is called: where an earlier call may have made it without our hearing of it, the
    run is looked for by its start, to the millisecond, and its tags. ``begun``: an earlier process may have."""

    def __init__(
        self,
        tracker: Tracker,
        name: str,
        tags: Mapping[str, Any],
        parent: str | None,
        start_ms: int,
        begun: bool = False,
    ):
        all_tags = {"mlflow.runName": name, "mlflow.user": user_name(), "mlflow.source.name": "copernicus"} | dict(tags)
        if parent is not None:
            all_tags[PARENT_TAG] = parent
        self.tracker, self.name, self.start_ms, self.begun = tracker, name, start_ms, begun
        self.doubtful = begun
        self.tags = {clean_name(k): clean_text(v, MAX_TAG) for k, v in all_tags.items()}

    def __call__(self) -> str:
        """The run's id."""
        if self.begun:
            self.doubtful = True
            if made := self.made():
                return made[0]
        self.begun = True
        client, experiment = self.tracker.client, self.tracker.experiment_id
        return client.create_run(experiment, self.start_ms, self.tags, self.name).info.run_id

    def settle(self, run_id: str) -> None:
        """Once the run is filled: a server that stood still may have made it late, by a request given up, beside ours."""
        if self.doubtful:
            for other in self.made():
                if other != run_id:
                    self.tracker.client.delete_run(other)

    def made(self) -> list[str]:
        """Ids of the runs that earlier calls made."""
        found = self.tracker.client.search_runs(
            [self.tracker.experiment_id], f"attributes.start_time = {self.start_ms}", max_results=1000
        )
        expected = self.tags.items() - {("mlflow.user", self.tags["mlflow.user"])}  # another may resume
        return [r.info.run_id for r in found if expected <= r.data.tags.items()]


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
    if (shipped := where / "commit.txt").exists():  # carried to a cluster by `shipping.py`
        return shipped.read_text().strip()
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


def user_name() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container without a passwd entry
        return "unknown"
