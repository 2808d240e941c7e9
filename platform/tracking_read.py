"""Leaderboards out of MLflow alone: finds sweeps by their tags and reads their final runs. Writes nothing there."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from copernicus.datasets.bench.tasks import get_task
from copernicus.datasets.sensors import InputError
from copernicus.platform.leaderboard import Cell, Leaderboard, Score, join
from copernicus.platform.tracking import FAILED, FINISHED, mask, quiet

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PAGE = 1000
DESCRIPTIONS = ("task", "encoder", "protocol", "model", "language")
"""Parameters of a trial that say what it is; the others are its settings."""
MAX_TAG = 5000  # characters of the failures' tag; MLflow's own limit on some stores


@dataclass(frozen=True)
class SweepRuns:
    """One sweep in the store: its name, its id, its parent runs (the newest first)."""

    name: str
    id: str
    parents: tuple[Run, ...]

    def __str__(self) -> str:
        return f"{self.name} ({self.id})"


def read_mlflow(uri: str, experiment: str | None = None, sweeps: Sequence[str] = ()) -> tuple[str, Leaderboard]:
    """The leaderboard of one sweep, or of several together, and a title.

    Args:
        experiment: its name in MLflow; None: all experiments.
        sweeps: names or ids of sweeps; none: the only one that is there.

    Raises:
        InputError: the store cannot be read, or has no such experiment or sweep, or several where none was named.
    """
    from mlflow.exceptions import MlflowException

    client = open_store(uri)
    try:
        experiments = _experiments(client, uri, experiment)
        chosen = _choose(_sweeps(client, experiments), sweeps, uri)
        names = Counter(s.name for s in chosen)
        boards = {
            s.name if names[s.name] == 1 else f"{s.name}-{s.id[:8]}": _read_sweep(client, experiments, s)
            for s in chosen
        }
    except MlflowException as error:
        raise InputError(f"--mlflow {mask(uri)}: {mask(str(error).strip().splitlines()[0])}") from None
    return " + ".join(boards), join(boards)


def open_store(uri: str) -> MlflowClient:
    """A client of a store that is there already.

    Raises:
        InputError: it is not, or cannot be opened.
    """
    quiet()
    # A server that is down should be said within seconds, not after minutes of back-off.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import sqlalchemy
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    # MLflow would make a database that is not there, and try for minutes to reach one that is down.
    if uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).is_file():
        raise InputError(
            f"--mlflow: no store {uri.removeprefix('sqlite:///')}; give the URI that the sweep recorded in"
        )
    try:
        if uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mssql"):
            engine = sqlalchemy.create_engine(uri)
            try:
                if "experiments" not in sqlalchemy.inspect(engine).get_table_names():
                    raise InputError(f"--mlflow {mask(uri)}: this database is no MLflow store")
            finally:
                engine.dispose()
        return MlflowClient(uri)
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise InputError(f"--mlflow: cannot open {mask(uri)}: {mask(str(error).strip().splitlines()[0])}") from None


def failures_tag(failures: Mapping[str, str]) -> str:
    """Why cells failed, by "task-encoder", as the sweep's tag ``failed_cells``; long reasons are cut."""
    room = max(20, MAX_TAG // max(1, len(failures)) - 60)
    return json.dumps({key: reason[:room] for key, reason in failures.items()})


def _experiments(client: MlflowClient, uri: str, name: str | None) -> list[str]:
    found: list[Any] = []
    token = None
    while True:
        page = client.search_experiments(max_results=PAGE, page_token=token)
        found += page
        token = page.token
        if not token:
            break
    if name is None:
        return [e.experiment_id for e in found]
    chosen = [e.experiment_id for e in found if e.name == name]
    if not chosen:
        names = ", ".join(e.name for e in found)
        raise InputError(f"--experiment: no {name!r} in {mask(uri)}; its experiments are {names}")
    return chosen


def _search(client: MlflowClient, experiments: list[str], query: str) -> Iterator[Run]:
    """All runs that were not deleted, the newest first, however many they are."""
    token = None
    while True:
        page = client.search_runs(
            experiments, query, max_results=PAGE, order_by=["attributes.start_time DESC"], page_token=token
        )
        yield from page
        token = page.token
        if not token:
            return


def _sweeps(client: MlflowClient, experiments: list[str]) -> list[SweepRuns]:
    parents: dict[str, list[Run]] = {}
    for run in _search(client, experiments, "tags.kind = 'sweep'"):
        if "sweep_id" in run.data.tags:
            parents.setdefault(run.data.tags["sweep_id"], []).append(run)
    return [SweepRuns(runs[0].data.tags.get("sweep", id_), id_, tuple(runs)) for id_, runs in parents.items()]


def _choose(found: list[SweepRuns], names: Sequence[str], uri: str) -> list[SweepRuns]:
    if not found:
        raise InputError(f"no sweep in {mask(uri)}: run one, or name another store or experiment")
    known = ", ".join(str(s) for s in found)
    if not names:
        if len(found) > 1:
            raise InputError(f"{len(found)} sweeps in {mask(uri)}; name some with --sweep: {known}")
        return found
    chosen: dict[str, SweepRuns] = {}
    for name in names:
        matching = [s for s in found if name in (s.name, s.id)]
        if not matching:
            raise InputError(f"--sweep: no {name!r} in {mask(uri)}; its sweeps are {known}")
        chosen |= {s.id: s for s in matching}
    return list(chosen.values())


def _read_sweep(client: MlflowClient, experiments: list[str], sweep: SweepRuns) -> Leaderboard:
    notes: list[str] = []
    planned = _planned(sweep, notes)
    failures = _failures(sweep, planned)
    scores: dict[tuple[str, str, int], Score] = {}
    doubled, endless = [], []
    for runs in _trials(client, experiments, sweep).values():
        finished = sorted((r for r in runs if r.info.status == FINISHED), key=_ended, reverse=True)
        run = finished[0] if finished else runs[0]
        tags, id_ = run.data.tags, run.info.run_id
        try:
            key = tags["task"], tags["encoder"], int(tags["seed"])
        except (KeyError, ValueError):
            notes.append(f"run {id_} lacks a task, an encoder or a seed among its tags and is left out")
            continue
        name = f"{key[0]} / {key[1]}, seed {key[2]}"
        if not finished:
            endless.append((key, run))
        elif (score := _score(client, run, *key)) is None:
            notes.append(f"run {id_} ({name}) has no test score and is left out")
        elif key in scores:
            raise InputError(f"runs {scores[key].run_id} and {id_} of {sweep} are both of {name}: delete one of them")
        else:
            scores[key] = score
            if len(finished) > 1:
                doubled.append(name)
    states = Counter[str]()
    for key, run in endless:
        if key not in scores:  # a trial that failed may have been run again, as another one
            states[run.info.status] += 1
            if run.info.status == FAILED:
                failures.setdefault(key[:2], run.data.tags.get("error", ""))
    if doubled:
        more = f" and {len(doubled) - 5} more" if len(doubled) > 5 else ""
        notes.append(
            f"finished more than once, of which the run that ended last counts: {'; '.join(sorted(doubled)[:5])}{more}"
        )
    if states:
        said = ", ".join(f"{n} {status}" for status, n in sorted(states.items()))
        notes.append(f"final runs without a score, which count as missing: {said}")
    order = {cell: i for i, cell in enumerate(planned)}
    ordered = sorted(scores, key=lambda key: (order.get(key[:2], len(order)), key))
    return Leaderboard(tuple(scores[key] for key in ordered), planned, failures, tuple(notes))


def _trials(client: MlflowClient, experiments: list[str], sweep: SweepRuns) -> dict[str, list[Run]]:
    """The final runs of a sweep, by the key of their trial."""
    trials: dict[str, list[Run]] = {}
    query = "tags.kind = 'trial' and tags.role = 'final'"
    if "'" not in sweep.id:  # it would end the query's string
        query += f" and tags.sweep_id = '{sweep.id}'"
    for run in _search(client, experiments, query):
        if run.data.tags.get("sweep_id") == sweep.id:
            trials.setdefault(run.data.tags.get("trial_key", run.info.run_id), []).append(run)
    return trials


def _ended(run: Run) -> tuple[int, int]:
    return (run.info.end_time or 0, run.info.start_time)


def _planned(sweep: SweepRuns, notes: list[str]) -> dict[Cell, tuple[int, ...]]:
    for parent in sweep.parents:
        try:
            cells = json.loads(parent.data.tags["cells"])
            seeds = cells["seeds"]  # the same for all encoders, or by encoder: closed forms need but one
            by_encoder = seeds if isinstance(seeds, dict) else dict.fromkeys(cells["encoders"], seeds)
            return {
                (task, encoder): tuple(int(seed) for seed in by_encoder[encoder])
                for task in cells["tasks"]
                for encoder in cells["encoders"]
            }
        except (KeyError, ValueError, TypeError):
            continue
    notes.append("the sweep's run does not say what was planned (tag cells), so cells without any run cannot be shown")
    return {}


def _failures(sweep: SweepRuns, planned: Mapping[Cell, Any]) -> dict[Cell, str]:
    """The newest parent's tag: JSON of reasons by "task-encoder"; a plain list of those, as older versions wrote it."""
    text = sweep.parents[0].data.tags.get("failed_cells", "{}")
    try:
        reasons: dict[str, str] = {str(key): str(reason) for key, reason in json.loads(text).items()}
    except (ValueError, AttributeError):
        reasons = dict.fromkeys((key.strip() for key in text.split(",")), "")
    return {cell: reasons["-".join(cell)] for cell in planned if "-".join(cell) in reasons}


def _score(client: MlflowClient, run: Run, task: str, encoder: str, seed: int) -> Score | None:
    metric, metrics = get_task(task).metric_key, run.data.metrics
    test, val = metrics.get(f"test/{metric}"), metrics.get(f"val/{metric}")
    if test is None or val is None or not math.isfinite(test):
        return None
    curve: dict[int, float] = {}
    if f"val_{metric}" in metrics:
        history = client.get_metric_history(run.info.run_id, f"val_{metric}")
        curve = {m.step: m.value for m in sorted(history, key=lambda m: m.timestamp)}
    return Score(
        task,
        encoder,
        seed,
        test,
        val,
        {k: _value(v) for k, v in run.data.params.items() if k not in DESCRIPTIONS},
        run.info.run_id,
        run.data.tags.get("protocol", "probe"),
        metrics.get(f"test/{metric}_batchmean"),
        tuple(curve[step] for step in sorted(curve)),
    )


def _value(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
