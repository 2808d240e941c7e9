"""The sweep as a stage of an experiment: its trials in MLflow, its pictures, its leaderboard."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from copernicus.datasets.bench import get_task
from copernicus.platform.board_files import write_leaderboard
from copernicus.platform.cell import Cell
from copernicus.platform.journal import FAILED, FINAL, FINISHED, STOPPED, Journal, Trial
from copernicus.platform.leaderboard import Leaderboard, Score
from copernicus.platform.progress import progress_bar
from copernicus.platform.schema import Experiment, Sweep
from copernicus.platform.spool import Spool
from copernicus.platform.sweep import cells, cells_language, sweep
from copernicus.platform.tracking import FAILED as RUN_FAILED
from copernicus.platform.tracking import FINISHED as RUN_FINISHED
from copernicus.platform.tracking import Run, Tracker, git_commit
from copernicus.platform.tracking_read import failures_tag


def run_sweep(
    experiment: Experiment,
    settings: Sweep,
    checkpoint: Path | None,
    run_for: Callable[[dict[str, str]], Run],
    tracker: Tracker,
    parent: Run,
    console: Console,
) -> dict[str, str]:
    """Run what is left of the sweep, and write the leaderboard.

    Args:
        checkpoint: of this experiment's pretraining.
        run_for: gives the sweep's own run in MLflow (made with these tags, or the one of an earlier attempt).

    Returns:
        the errors of the cells that failed, by key.
    """
    plan = cells(settings, experiment.pretrain, checkpoint)
    languages, warnings = cells_language(settings, plan)
    for warning in warnings:
        console.print(f"  [yellow]warning[/] {warning}", soft_wrap=True)
    seeds = {cell.name: cell.seeds(settings, experiment.seed) for cell in plan}
    total = sum(cell.trials(settings) + len(seeds[cell.name]) for cell in plan)
    run = run_for({"kind": "sweep", "experiment": experiment.name, "sweep": experiment.name})
    planned = {"tasks": settings.tasks, "encoders": list(settings.encoders), "seeds": seeds}
    run.tags({"kind": "sweep", "sweep": experiment.name, "sweep_id": run.id, "cells": json.dumps(planned)})
    single = run.id == parent.id
    commit = git_commit()
    folder = experiment.folder / "sweep"
    stages: dict[str, str] = {}
    finished: set[str] = set()

    with contextlib.nullcontext() if single else run.ending(), progress_bar(console, "trials") as update:

        def say(message: str) -> None:
            console.print(f"  [yellow]warning[/] {message}", soft_wrap=True)

        with Spool(tracker, folder / "mlflow", on_state=say) as spool:

            def on_trial(cell: Cell, trial: Trial) -> None:
                record(spool, run, experiment, cell, trial, languages.get(cell.key), commit)
                if trial.status != FAILED:
                    finished.add(trial.key)
                on_stage(cell, f"{trial.role} {trial.number}")

            def on_stage(cell: Cell, stage: str) -> None:
                if stage in ("done", "failed"):
                    stages.pop(cell.key, None)
                else:
                    stages[cell.key] = stage
                now = "; ".join(f"{key} {stage}" for key, stage in list(stages.items())[:2])
                more = f" and {len(stages) - 2} more cells" if len(stages) > 2 else ""
                update(len(finished), total, now + more)

            journal, failed = sweep(settings, plan, experiment.seed, folder, on_trial, on_stage)
            if not spool.wait(2.0):
                say(f"waiting for the tracking server to take {spool.pending} trials")
        # All records are there now: the leaderboard's links need their runs.
        board = leaderboard(journal, plan, settings, experiment.seed, failed, spool)
        for file in write_leaderboard(board, experiment.folder, experiment.name, pictures(folder, plan)):
            run.artifact(file)
            if not single:
                parent.artifact(file)
        means = {}
        for task in board.tasks:
            for encoder in board.encoders:
                if (s := board.summary(task.name, encoder)) is not None:
                    means[f"{task.name}/{encoder}/mean"] = s.mean
                    if s.n > 1:
                        means[f"{task.name}/{encoder}/std"] = s.std
        run.metrics(means)
        run.tags({"failed_cells": failures_tag(failed)})
    if spool.refused:
        names = ", ".join(list(spool.refused)[:5])
        say(f"MLflow refused {len(spool.refused)} trials, which are in {spool.folder} alone: {names}")
    for key, message in failed.items():
        console.print(f"  [red]failed[/] {key}: {message}")
    return failed


def record(
    spool: Spool, run: Run, experiment: Experiment, cell: Cell, trial: Trial, language: str | None, commit: str
) -> None:
    """Hand a trial to MLflow; one that was handed over before is not handed over again."""
    # A failed trial may come again and succeed: that is another run.
    key = f"{trial.key}-failed" if trial.status == FAILED else trial.key
    if key in spool:
        return
    seed = trial.number if trial.role == FINAL else experiment.seed
    tags = {
        "kind": "trial", "task": cell.task, "encoder": cell.name, "protocol": cell.protocol, "role": trial.role,
        "seed": seed, "sweep": experiment.name, "sweep_id": run.id, "trial_key": key, "weights": cell.weights,
        "experiment": experiment.name, "git_commit": commit,
    }  # fmt: skip
    if trial.error:
        tags["error"] = trial.error[:500]
    if trial.status == STOPPED:
        tags["stopped"] = experiment.sweep.scheduler if experiment.sweep else ""
    parameters = {
        **trial.settings, "task": cell.task, "encoder": cell.name, "protocol": cell.protocol, "model": cell.model.name,
    }  # fmt: skip
    if language:
        parameters["language"] = language
    rows = list(enumerate(trial.curve))
    if trial.metrics:
        # The page's comparison plot opens on the first metric that all runs share: for trials of several tasks, a score
        # of one name. The test split's where there is one, else validation's.
        metric = get_task(cell.task).metric_key
        score = trial.metrics.get(f"test/{metric}", trial.metrics.get(f"val/{metric}"))
        assert score is not None, trial.key
        rows = [(len(trial.curve), {"score": score, **trial.metrics}), *rows]
    status = RUN_FAILED if trial.status == FAILED else RUN_FINISHED
    seconds = trial.metrics.get("seconds", 0.0)
    name = f"{cell.task} {cell.name} {trial.role} {trial.number}"
    spool.add_run(key, name, tags, run.id, parameters, rows, status, seconds)


def leaderboard(
    journal: Journal, plan: list[Cell], settings: Sweep, seed: int, failed: dict[str, str], spool: Spool
) -> Leaderboard:
    """The final scores of all cells, beside what was planned."""
    scores = []
    for cell in plan:
        metric = get_task(cell.task).metric_key
        wanted = cell.seeds(settings, seed)
        for t in journal.of(cell.key, FINAL):
            if t.status == FINISHED and t.number in wanted:
                curve = tuple(row[f"val_{metric}"] for row in t.curve if f"val_{metric}" in row)
                test, batchmean = t.metrics[f"test/{metric}"], t.metrics.get(f"test/{metric}_batchmean")
                run_id = spool.run_id(t.key) or ""
                score = Score(cell.task, cell.name, t.number, test, t.metrics[f"val/{metric}"], t.settings, run_id)
                scores.append(dataclasses.replace(score, protocol=cell.protocol, batchmean=batchmean, curve=curve))
    planned = {(cell.task, cell.name): tuple(cell.seeds(settings, seed)) for cell in plan}
    failures = {(cell.task, cell.name): failed[cell.key] for cell in plan if cell.key in failed}
    return Leaderboard(tuple(scores), planned, failures)


def pictures(folder: Path, plan: list[Cell]) -> dict[tuple[str, str], list[Path]]:
    """The pictures that the cells have drawn."""
    return {(cell.task, cell.name): sorted((folder / cell.key).glob("*.png")) for cell in plan}
