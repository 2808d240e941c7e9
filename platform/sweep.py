"""The sweep on Ray Tune: for every task and encoder (a cell) one search of its own, then seeds of its best setting.

Whatever is finished is on disk before the next thing starts, so that a resumed sweep repeats none of it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.tune.search.optuna import OptunaSearch

from copernicus.datasets.bench import TASKS
from copernicus.datasets.sensors import InputError
from copernicus.platform.checkpoint import architecture, trained_language
from copernicus.platform.experiment import Encoder, Model, Pretrain, Space, Sweep
from copernicus.platform.features import TaskFeatures, encode_task
from copernicus.platform.language import language_warning, open_language, variables
from copernicus.platform.leaderboard import Leaderboard, Score


class SweepFailed(RuntimeError):
    """No cell gave a score."""


@dataclass(frozen=True)
class Cell:
    """One task with one encoder. ``weights``: a file, hf://... or none."""

    task: str
    name: str  # of the encoder
    model: Model
    weights: str
    seed: int  # of the encoder's initial weights
    language: str | None = None  # file of language embeddings, for tasks of variables

    @property
    def key(self) -> str:
        return f"{self.task}-{self.name}"


@dataclass(frozen=True)
class Trial:
    """A finished trial: of the search (``role`` search: validation only) or of the final estimate (``role`` final)."""

    cell: Cell
    role: str
    number: str  # Tune's own in the search; the seed in the final estimate
    settings: dict[str, float]
    metrics: dict[str, float]
    curve: list[dict[str, float]]  # per epoch

    @property
    def key(self) -> str:
        return f"{self.cell.key}-{self.role}-{self.number}"


def cells(settings: Sweep, pretrained: Pretrain | None, checkpoint: Path | None) -> list[Cell]:
    """All cells, task by task."""

    def cell(task: str, name: str, encoder: Encoder) -> Cell:
        model = encoder.model or (pretrained.model if pretrained else None)
        assert model is not None, "checked when the experiment was loaded"
        weights, language = encoder.weights, encoder.language
        if weights == "pretrain":
            assert pretrained is not None, "checked when the experiment was loaded"
            weights, language = str(checkpoint), language or pretrained.language
        return Cell(task, name, model, weights, encoder.seed, language)

    return [cell(task, name, encoder) for task in settings.tasks for name, encoder in settings.encoders.items()]


def cells_language(settings: Sweep, plan: list[Cell]) -> tuple[dict[str, str], list[str]]:
    """Of the cells whose task is one of variables: what their embeddings are, by cell; and warnings, each once.

    Raises:
        InputError: embeddings or weights that cannot be read.
    """
    described: dict[str, str] = {}
    warnings: list[str] = []
    for cell in plan:
        names = variables(TASKS[cell.task].sensors(settings.preset))  # type: ignore[arg-type]
        if names:
            table = open_language(cell.language)
            described[cell.key] = table.describe(names)
            trained = {} if cell.weights == "none" else trained_language(cell.weights)
            warning = language_warning(table, names, trained)
            line = f"encoder {cell.name}: {warning}"
            if warning and line not in warnings:
                warnings.append(line)
    return described, warnings


def resolved(name: str, sizes: dict[str, int]) -> tuple[str, dict[str, Any]]:
    """A model with all its sizes, those that its name gives among them."""
    from copernicus.models.zoo import ZOO

    return name, {**(ZOO[name][1] if name in ZOO else {}), **sizes}


def build_encoder(cell: Cell) -> Any:
    """The cell's encoder, frozen; those of the zoo pool their patch tokens."""
    from copernicus.models.weights import load_weights
    from copernicus.models.zoo import create_encoder

    sizes = cell.model.encoder_overrides()
    # Shapes do not tell the number of heads: a checkpoint of ours says what it is.
    known = None if cell.weights == "none" else architecture(cell.weights)
    if known is not None and resolved(*known) != resolved(cell.model.name, sizes):
        raise InputError(
            f"encoder {cell.name}: {cell.weights} is of {known[0]} {known[1]}, not {cell.model.name} {sizes}"
        )
    # An encoder that knows no language has no such argument.
    language = {"language": open_language(cell.language)} if cell.language else {}
    model = create_encoder(cell.model.name, TASKS[cell.task].sensor, cell.seed, **sizes, **language)
    if cell.weights != "none":
        load_weights(model, cell.weights)
    return model.eval().requires_grad_(False)


def sweep(
    settings: Sweep,
    plan: list[Cell],
    seed: int,
    folder: Path,
    on_trial: Callable[[Trial], str],
    on_progress: Callable[[Cell, str], None] = lambda cell, stage: None,
) -> tuple[Leaderboard, dict[str, str]]:
    """Run what is unfinished of all cells; one failing cell does not stop the others.

    ``on_trial(trial)`` records a finished trial, once, and returns its run's id. ``on_progress(cell, stage)`` hears
    what happens. Returns the leaderboard, and the error of each failed cell by its key.

    Raises:
        SweepFailed: every cell failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "trials.jsonl")
    scores: list[Score] = []
    failed: dict[str, str] = {}
    for cell in plan:
        try:
            scores += _run_cell(settings, cell, seed, folder / cell.key, journal, on_trial, on_progress)
            on_progress(cell, "done")
        except Exception as error:
            failed[cell.key] = _last_line(error)
            (folder / f"{cell.key}-error.txt").write_text(traceback.format_exc())
            on_progress(cell, "failed")
    if not scores:
        key, message = next(iter(failed.items()))
        raise SweepFailed(f"every cell failed; {key}: {message}")
    return Leaderboard(tuple(scores)), failed


class Journal:
    """Finished trials by key, appended to a file as they finish."""

    def __init__(self, path: Path):
        self.path = path
        self.rows: dict[str, dict[str, Any]] = {}
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the line a kill cut off: its trial is not finished
                    continue
                self.rows[row["key"]] = row

    def add(self, trial: Trial, run_id: str) -> dict[str, Any]:
        row = {"key": trial.key, "run_id": run_id, "settings": trial.settings, "metrics": trial.metrics}
        torn = self.path.exists() and self.path.stat().st_size and not self.path.read_bytes().endswith(b"\n")
        with open(self.path, "a") as file:
            file.write(("\n" if torn else "") + json.dumps(row) + "\n")
        self.rows[trial.key] = row
        return row


def _run_cell(
    settings: Sweep,
    cell: Cell,
    seed: int,
    folder: Path,
    journal: Journal,
    on_trial: Callable[[Trial], str],
    on_progress: Callable[[Cell, str], None],
) -> list[Score]:
    import ray

    task = TASKS[cell.task]
    seeds = [seed + 1 + i for i in range(settings.seeds)]  # not the search's own seed: its luck was selected
    wanted = [f"{cell.key}-final-{s}" for s in seeds]
    if not all(key in journal.rows for key in wanted):
        on_progress(cell, "encode")
        resources = {"num_cpus": settings.cpus_per_trial, "num_gpus": settings.gpus_per_trial}
        features = ray.get(ray.remote(encode_cell).options(**resources).remote(cell, settings))
        on_progress(cell, "search")
        best = _search(settings, cell, features, seed, folder, journal, on_trial)
        on_progress(cell, "seeds")
        probe = ray.remote(run_trial).options(**resources)
        running = {
            probe.remote(cell, settings, best, features, s, True): s
            for s in seeds
            if wanted[seeds.index(s)] not in journal.rows
        }
        while running:
            (ready,), _ = ray.wait(list(running), num_returns=1)
            number = running.pop(ready)
            metrics, curve = ray.get(ready)
            trial = Trial(cell, "final", str(number), best, metrics, curve)
            journal.add(trial, on_trial(trial))
    rows = [(s, journal.rows[key]) for s, key in zip(seeds, wanted, strict=True)]
    metric = task.metric_key
    return [
        Score(
            cell.task,
            cell.name,
            s,
            r["metrics"][f"test/{metric}"],
            r["metrics"][f"val/{metric}"],
            r["settings"],
            r["run_id"],
        )
        for s, r in rows
    ]


def encode_cell(cell: Cell, settings: Sweep) -> TaskFeatures:
    """Encode the task once with the cell's frozen encoder, or find it encoded already."""
    import torch

    torch.set_num_threads(max(1, int(settings.cpus_per_trial)))
    return encode_task(
        build_encoder(cell),
        TASKS[cell.task],
        settings.data,
        settings.cache,
        preset=settings.preset,  # type: ignore[arg-type]
        image_size=settings.image_size.get(cell.task),
    )


def run_trial(
    cell: Cell, settings: Sweep, chosen: dict[str, float], features: TaskFeatures, seed: int, final: bool
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Train and evaluate one head: its metrics and its curve. The test split counts in the final estimate only."""
    import torch

    from copernicus.platform.probe import ProbeSettings, run_probe

    torch.set_num_threads(max(1, int(settings.cpus_per_trial)))
    task = TASKS[cell.task]
    given = {"epochs": settings.epochs} | ({"batch_size": settings.batch_size} if settings.batch_size else {})
    whole = {k: int(v) if k in ("epochs", "batch_size") else v for k, v in (given | chosen).items()}
    device = "cuda" if settings.gpus_per_trial else "cpu"
    result = run_probe(features, task, ProbeSettings.for_task(task, **whole), seed, test=final, device=device)
    metrics = {f"val/{k}": v for k, v in result.val.items()} | {"val/best_epoch": float(result.best_epoch)}
    if result.test is not None:
        metrics |= {f"test/{k}": v for k, v in result.test.items()}
        metrics |= {f"samples/{split}": float(n) for split, n in result.samples.items()}
    return metrics, result.curves


def _search(
    settings: Sweep,
    cell: Cell,
    features: TaskFeatures,
    seed: int,
    folder: Path,
    journal: Journal,
    on_trial: Callable[[Trial], str],
) -> dict[str, float]:
    """The setting with the best validation metric."""
    task = TASKS[cell.task]
    metric, mode = f"val/{task.metric_key}", "max" if task.higher_is_better else "min"
    done = folder / "best.json"
    if done.exists():
        return json.loads(done.read_text())
    if not settings.search:
        return {}

    def trainable(chosen: dict[str, float]) -> None:
        metrics, curve = run_trial(cell, settings, chosen, features, seed, final=False)
        tune.report({**metrics, "curve": curve})

    space = {name: _domain(s, settings.searcher) for name, s in settings.search.items()}
    searcher: Any = BasicVariantGenerator(random_state=seed)
    if settings.searcher == "optuna":
        searcher = OptunaSearch(metric=metric, mode=mode, seed=seed)
    run_config = tune.RunConfig(name="tune", storage_path=str(folder), callbacks=[Recorder(cell.key)], verbose=0)
    resources = {"cpu": settings.cpus_per_trial, "gpu": settings.gpus_per_trial}
    bounded = tune.with_resources(trainable, resources)
    path = folder / "tune"
    state = path / "tuner.pkl"
    if tune.Tuner.can_restore(str(path)) and state.stat().st_size:
        tuner = tune.Tuner.restore(str(path), trainable=bounded, resume_unfinished=True, resume_errored=True)
    else:
        # Killed before Tune had written its state: no trial was begun.
        shutil.rmtree(path, ignore_errors=True)
        config = tune.TuneConfig(
            metric=metric,
            mode=mode,
            num_samples=1 if settings.searcher == "grid" else settings.trials,
            search_alg=searcher,
            reuse_actors=True,  # a new process a trial would cost more than the trial
        )
        tuner = tune.Tuner(bounded, param_space=space, tune_config=config, run_config=run_config)

    def record(number: str, chosen: dict[str, float], result: dict[str, Any]) -> None:
        trial = Trial(cell, "search", number, chosen, _numbers(result), result["curve"])
        if trial.key not in journal.rows:
            journal.add(trial, on_trial(trial))

    with _recording(cell.key, record):
        results = tuner.fit()
    if results.num_errors == len(results):
        raise SweepFailed(f"all {len(results)} trials failed: {_last_line(results.errors[0])}")
    best = {k: float(v) for k, v in (results.get_best_result(metric, mode).config or {}).items()}
    done.write_text(json.dumps(best))
    return best


_RECORDING: dict[str, Callable[[str, dict[str, float], dict[str, Any]], None]] = {}
"""What hears of finished trials while a search runs, by cell: Tune pickles its callbacks, so those hold a key only."""


@contextlib.contextmanager
def _recording(key: str, record: Callable[[str, dict[str, float], dict[str, Any]], None]) -> Iterator[None]:
    _RECORDING[key] = record
    try:
        yield
    finally:
        del _RECORDING[key]


class Recorder(tune.Callback):
    """Hands each finished trial of a cell on, on the driver."""

    def __init__(self, key: str):
        self.key = key

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        _RECORDING[self.key](trial.trial_id, dict(trial.config), trial.last_result)


def _domain(space: Space, searcher: str) -> Any:
    if space.values:
        return tune.grid_search(space.values) if searcher == "grid" else tune.choice(space.values)
    assert space.low is not None
    assert space.high is not None
    return tune.loguniform(space.low, space.high) if space.log else tune.uniform(space.low, space.high)


def _numbers(result: dict[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in result.items() if k.startswith("val/")}


def _last_line(error: BaseException) -> str:
    return str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
