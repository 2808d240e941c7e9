"""One cell of a sweep, a task with an encoder: encode the task once, search, then repeat the best setting with seeds.

Each cell is run by a process of its own on the driver's machine (`CellRunner`), for Ray Tune's loop is of a whole process;
its trials run wherever the cluster has room.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from copernicus.datasets.bench import get_task
from copernicus.datasets.bench.reader import TaskDataset
from copernicus.datasets.bench.task import Task
from copernicus.platform.encoders import open_encoder
from copernicus.platform.encoding import FLIPS
from copernicus.platform.features import TaskFeatures, encode_task
from copernicus.platform.journal import FAILED, FINAL, FINISHED, SEARCH, STOPPED, Trial, as_numbers, best_trial
from copernicus.platform.schema import FROZEN, QUICK, Model, Sweep
from copernicus.platform.search_space import optuna_search, planned, trial_count

WORTH_A_WORKER = 2000
"""Images to encode for which it is worth starting a worker of a pool, which takes some ten seconds."""
DEATHS = 5
"""How often a trial is begun again whose process, or whose node, died."""
EPOCHS = "epochs"
"""Folder of the checkpoints of fine-tuning trials, which go on after their last epoch where they were killed."""
Emit = Callable[[str, Any], None]
"""Tells the driver of ("stage", text) or ("trial", Trial)."""


class CellFailed(RuntimeError):
    """A cell gave no score."""


@dataclass(frozen=True)
class Cell:
    """One task with one encoder. ``weights``: a file, hf://... or none."""

    task: str
    name: str  # of the encoder
    model: Model
    weights: str
    seed: int  # of the encoder's initial weights
    language: str | None = None  # file of language embeddings, for tasks of variables
    protocol: str = "probe"
    blocks: int | None = None  # finetune: the last so many blocks; None: all
    lora_rank: int | None = None

    @property
    def key(self) -> str:
        return f"{self.task}-{self.name}"

    def seeds(self, settings: Sweep, seed: int) -> list[int]:
        """Seeds of the final estimate: not the search's own, whose luck was selected. Closed forms draw nothing."""
        return [seed + 1 + i for i in range(1 if self.protocol in QUICK else settings.seeds)]

    def trials(self, settings: Sweep) -> int:
        """Trials of the search."""
        return 0 if self.protocol in QUICK else trial_count(settings.search, settings.searcher, settings.trials)


def build_encoder(cell: Cell) -> Any:
    """The cell's encoder in evaluation mode, frozen unless it is tuned; those of the zoo pool their patch tokens."""
    model = open_encoder(cell.name, cell.model, cell.weights, get_task(cell.task).sensor, cell.seed, cell.language)
    return model.requires_grad_(False) if cell.protocol in FROZEN else model


class CellRunner:
    """Runs cells one after the other, in a process of its own."""

    def __init__(self, verbose: bool = False) -> None:
        # Trials are kept in the journal: Tune need write neither its logs nor, ever again, its state.
        os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
        os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "3600")
        os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
        os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
        if not verbose:
            from copernicus.platform.session import silence

            silence()

    def run(
        self, cell: Cell, settings: Sweep, seed: int, folder: Path, done: list[Trial], share: int, events: Any
    ) -> None:
        """Run what is unfinished of a cell.

        Args:
            done: its trials that are finished already.
            share: how many trials at once.
            events: a queue that takes (cell key, kind, content) for the driver.

        Raises:
            InputError, CellFailed: the cell cannot give a score.
        """
        run_cell(cell, settings, seed, folder, done, share, lambda kind, what: events.put((cell.key, kind, what)))


def run_cell(cell: Cell, settings: Sweep, seed: int, folder: Path, done: list[Trial], share: int, emit: Emit) -> None:
    """See `CellRunner.run`."""
    import ray

    task = get_task(cell.task)
    tested = {t.number for t in done if t.role == FINAL and t.status == FINISHED}
    missing = [s for s in cell.seeds(settings, seed) if s not in tested]
    if not missing:
        return
    resources = {"num_cpus": settings.cpus_per_trial, "num_gpus": settings.gpus_per_trial}
    features = None
    if cell.protocol in FROZEN:
        emit("stage", "encoding")
        features = _encode(cell, settings, share, emit)
    searched = [t for t in done if t.role == SEARCH]
    count = cell.trials(settings)
    if len([t for t in searched if t.status != FAILED]) < count and not _all_tried(searched, count):
        emit("stage", "search")
        searched = _search(cell, settings, features, seed, folder, searched, share, emit)
    best = best_trial(searched, task.metric_key, task.higher_is_better)
    if count and best is None:
        errors = dict.fromkeys(t.error for t in searched)
        raise CellFailed(f"no trial of the search succeeded: {'; '.join(list(errors)[:3])}")
    chosen = best.settings if best else {}
    emit("stage", "seeds")
    trial: Any = ray.remote(run_trial)
    trial = trial.options(**resources, max_retries=DEATHS)
    first = cell.seeds(settings, seed)[0]
    shared = ray.put(features)  # once: those that are not kept hold their encoder
    running: dict[Any, int] = {}
    failed = ""
    while missing or running:
        while missing and len(running) < share:
            number = missing.pop(0)
            kept = folder / EPOCHS / f"final-{number}-{_digest(chosen)}"
            running[trial.remote(cell, settings, chosen, shared, number, kept, True, number == first)] = number
        (ready,), _ = ray.wait(list(running), num_returns=1)
        number = running.pop(ready)
        try:
            outcome = ray.get(ready)
        except Exception as error:  # the other seeds still count
            failed = last_line(error)
            emit("trial", Trial(cell.key, FINAL, number, chosen, status=FAILED, error=failed))
        else:
            for name, png in outcome.pictures.items():
                (folder / name).write_bytes(png)
            emit("trial", Trial(cell.key, FINAL, number, chosen | outcome.chosen, outcome.metrics, outcome.curve))
    shutil.rmtree(folder / EPOCHS, ignore_errors=True)
    if failed:
        raise CellFailed(failed)


def _digest(chosen: dict[str, float]) -> str:
    return hashlib.sha256(json.dumps(sorted(chosen.items())).encode()).hexdigest()[:12]


def _all_tried(searched: list[Trial], count: int) -> bool:
    """Some trials failed but every one was tried: a setting that fails once fails again, unless nothing worked."""
    return len(searched) >= count and any(t.status != FAILED for t in searched)


def _encode(cell: Cell, settings: Sweep, share: int, emit: Emit) -> TaskFeatures:
    import ray

    def progress(split: str, done: int, total: int) -> None:
        emit("stage", f"encoding {split} {done}/{total}")

    task = get_task(cell.task)
    copies = {"train": len(FLIPS), "val": 1, "test": 1}
    passes = sum(n * len(open_split(task, settings, split)) for split, n in copies.items())
    workers = min(share, passes // WORTH_A_WORKER)
    if workers > 1:
        return encode_cell(cell, settings, workers, progress)
    # One worker is a task like any other.
    resources = {"num_cpus": settings.cpus_per_trial, "num_gpus": settings.gpus_per_trial}
    encode: Any = ray.remote(encode_cell)
    return ray.get(encode.options(**resources).remote(cell, settings, 0, progress))


def encode_cell(cell: Cell, settings: Sweep, workers: int = 0, progress: Any = None) -> TaskFeatures:
    """Encode the task once with the cell's frozen encoder, or find it encoded already.

    Args:
        workers: how many processes encode; 0: this one.
    """
    import torch

    encoder = build_encoder(cell)
    if not workers:
        torch.set_num_threads(max(1, int(settings.cpus_per_trial)))
        encoder = encoder.to("cuda" if settings.gpus_per_trial else "cpu")
    features = encode_task(
        encoder,
        get_task(cell.task),
        settings.data,
        settings.cache,
        preset=settings.preset,  # type: ignore[arg-type]
        image_size=settings.image_size.get(cell.task),
        precision=settings.precision,  # type: ignore[arg-type]
        keep=settings.features,  # type: ignore[arg-type]
        cache_gb=settings.cache_gb,
        workers=workers,
        cpus_per_worker=settings.cpus_per_trial,
        gpus_per_worker=settings.gpus_per_trial,
        progress=progress,
    )
    encoder.cpu()  # splits that are not kept hold it, and travel to processes that have no GPU
    return features


def open_split(task: Task, settings: Sweep, split: str) -> TaskDataset:
    return task.open(settings.data, split, settings.preset, settings.image_size.get(task.name))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Outcome:
    """What a trial came to: figures, their course, and PNG files by name."""

    metrics: dict[str, float]
    curve: list[dict[str, float]]
    pictures: dict[str, bytes]
    chosen: dict[str, float]  # what a quick look chose for itself


def run_trial(
    cell: Cell,
    settings: Sweep,
    chosen: dict[str, float],
    features: TaskFeatures | None,
    seed: int,
    kept: Path,
    final: bool,
    pictures: bool = False,
    report: Callable[[int, dict[str, float]], None] | None = None,
) -> Outcome:
    """Train and evaluate one head (of the tuned protocols, the encoder too). The test split counts in the final estimate
    only.

    Args:
        kept: folder for the checkpoints of a tuned encoder.
    """
    import torch

    from copernicus.platform.finetune import FinetuneSettings, run_finetune
    from copernicus.platform.probe import ProbeSettings, run_probe
    from copernicus.platform.quick_probes import run_quick
    from copernicus.platform.trial_pictures import SHOWN, draw_trial

    started = time.monotonic()
    torch.set_num_threads(max(1, int(settings.cpus_per_trial)))
    task = get_task(cell.task)
    device = "cuda" if settings.gpus_per_trial else "cpu"
    given = {"epochs": settings.epochs, "head": settings.head}
    given |= {"batch_size": settings.batch_size} if settings.batch_size else {}
    options: dict[str, Any] = {"test": final, "device": device, "examples": SHOWN if pictures else 0}
    if cell.protocol in QUICK:
        assert features is not None
        result = run_quick(features, task, cell.protocol, seed, test=final)
    elif cell.protocol == "probe":
        assert features is not None
        result = run_probe(features, task, ProbeSettings.for_task(task, **{**given, **chosen}), seed, report, **options)
    else:
        tuning = {"blocks": cell.blocks, "lora_rank": cell.lora_rank}
        whole = FinetuneSettings.for_task(task, **{**given, **chosen}, **tuning)
        splits = ("train", "val", "test") if final else ("train", "val")
        datasets = {split: open_split(task, settings, split) for split in splits}
        # Of training from scratch the encoder's weights are part of what a seed decides.
        started_from = dataclasses.replace(cell, seed=cell.seed + seed) if cell.protocol == "scratch" else cell
        result = run_finetune(build_encoder(started_from), datasets, task, whole, seed, report, **options, folder=kept)
    metrics = {f"val/{k}": v for k, v in result.val.items()} | {"val/best_epoch": float(result.best_epoch)}
    if result.test is not None:
        metrics |= {f"test/{k}": v for k, v in result.test.items()}
        metrics |= {f"samples/{split}": float(n) for split, n in result.samples.items()}
    seconds = time.monotonic() - started
    drawn = {}
    if pictures:
        drawn = draw_trial(
            task, open_split(task, settings, "test"), result, f"{task.title}, {cell.name}: test split, seed {seed}"
        )
    return Outcome(metrics | {"seconds": seconds}, result.curves, drawn, result.chosen)


def _search(
    cell: Cell,
    settings: Sweep,
    features: TaskFeatures | None,
    seed: int,
    folder: Path,
    done: list[Trial],
    share: int,
    emit: Emit,
) -> list[Trial]:
    """Runs the trials that are left; returns all of the search."""
    from ray import tune

    task = get_task(cell.task)
    metric, mode = f"val/{task.metric_key}", "max" if task.higher_is_better else "min"
    best = f"best_val_{task.metric_key}"
    plan = planned(settings.search, settings.searcher, settings.trials, seed, cell.task)
    left = sorted(set(range(cell.trials(settings))) - {t.number for t in done if t.status != FAILED})
    asha = settings.scheduler == "asha"

    def trainable(config: dict[str, Any], features: TaskFeatures | None) -> None:
        chosen = plan[config["number"]] if plan is not None else config
        curve: list[dict[str, float]] = []

        def report(epoch: int, figures: dict[str, float]) -> None:
            curve.append(figures)
            tune.report({metric: figures[best], "epoch": epoch, "curve": curve, "whole": False})

        name = config["number"] if plan is not None else tune.get_context().get_trial_id()
        kept = folder / EPOCHS / f"search-{name}"
        try:
            outcome = run_trial(cell, settings, chosen, features, seed, kept, False, report=report if asha else None)
        except Exception as error:  # said here: Tune's callbacks hear of an error before they can read it
            tune.report({metric: float("nan"), "epoch": len(curve) + 1, "error": last_line(error)})
            return
        tune.report({**outcome.metrics, "epoch": len(outcome.curve) + 1, "curve": outcome.curve, "whole": True})

    trials = {t.number: t for t in done}

    def add(config: dict[str, Any], status: str, result: dict[str, Any], error: str = "") -> None:
        number = config["number"] if plan is not None else next(n for n in left if n not in numbered)
        numbered.add(number)
        settings_of = plan[number] if plan is not None else {k: float(v) for k, v in config.items()}
        metrics = as_numbers(result, ("val/", "seconds"))
        trial = Trial(cell.key, SEARCH, number, settings_of, metrics, list(result.get("curve", [])), status, error)
        trials[number] = trial
        emit("trial", trial)

    # Ray keeps functions by name for the whole job: under one name, cells would run each other's trials.
    trainable.__name__ = f"trial-{cell.key}"
    numbered: set[int] = set()

    class Recorder(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            result = trial.last_result
            if error := result.get("error", ""):
                add(dict(trial.config), FAILED, {}, error)
            else:
                add(dict(trial.config), FINISHED if result.get("whole") else STOPPED, result)

        def on_trial_error(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
            add(dict(trial.config), FAILED, {}, f"its process died {DEATHS + 1} times")

    searcher = None
    if plan is None:
        searcher = optuna_search(settings.search, metric, mode, seed, cell.task, done)
    scheduler = None
    if asha:
        searched_epochs = settings.search["epochs"].values if "epochs" in settings.search else None
        longest = int(max(searched_epochs or [settings.epochs]))
        scheduler = tune.schedulers.ASHAScheduler(
            time_attr="epoch", max_t=longest + 1, grace_period=max(1, settings.epochs // 8), reduction_factor=3
        )
    path = folder / "tune"
    shutil.rmtree(path, ignore_errors=True)
    tuner = tune.Tuner(
        tune.with_resources(
            # Features that are not kept hold their encoder: too large to travel as part of a function.
            tune.with_parameters(trainable, features=features),
            {"cpu": settings.cpus_per_trial, "gpu": settings.gpus_per_trial},
        ),
        param_space={"number": tune.grid_search(left)} if plan is not None else None,
        tune_config=tune.TuneConfig(
            metric=metric,
            mode=mode,
            num_samples=1 if plan is not None else len(left),
            search_alg=searcher,
            scheduler=scheduler,
            max_concurrent_trials=share,
            reuse_actors=True,  # a new process a trial would cost more than the trial
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(folder),
            callbacks=[Recorder()],
            verbose=0,
            # Errors of a trial's own are told, above, and would come again; what is left is lost processes and nodes.
            failure_config=tune.FailureConfig(max_failures=DEATHS),
        ),
    )
    tuner.fit()
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(folder / EPOCHS, ignore_errors=True)  # of trials that were stopped
    return sorted(trials.values(), key=lambda t: t.number)


def last_line(error: BaseException | str) -> str:
    """What went wrong, without the way there."""
    text = str(getattr(error, "cause", None) or error).strip()
    return text.splitlines()[-1] if text else type(error).__name__
