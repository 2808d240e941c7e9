"""Runs an experiment: makes its miniature Earth, pretrains, sweeps, compares, and goes on where it stopped.

State lies in the experiment's folder (`Experiment.folder`): the same YAML finds the same folder, MLflow runs included.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from copernicus.datasets.sensors import InputError
from copernicus.platform.board_files import read_leaderboard
from copernicus.platform.language import language_warning, variables
from copernicus.platform.progress import progress_bar, short_path, spell_time
from copernicus.platform.schema import STAGES, Climate, Embed, Experiment, Miniature, Pretrain, Sweep
from copernicus.platform.session import autoscales, ray_session
from copernicus.platform.shared_storage import SILENT, not_shared
from copernicus.platform.tables import terminal
from copernicus.platform.tracking import Run, Tracker, git_commit, mask, may_pass, store_errors

MOST_SHOWN = 20
MOST_COMPARED = 40
"""Runs in one address of MLflow's page that compares; terminals and browsers cut off longer ones."""

ROWS_AT_ONCE = 20
"""Steps whose figures go to MLflow in one request, which takes 1000 figures and records all or none."""


class State:
    """What an experiment has done so far, kept in ``state.json``."""

    def __init__(self, folder: Path):
        self.path = folder / "state.json"
        try:
            self.values: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        except ValueError as error:
            raise InputError(f"{self.path} is damaged ({error}); restore it, or give --fresh to start anew") from None

    def set(self, **values: Any) -> None:
        self.values |= values
        write_atomically(self.path, json.dumps(self.values, indent=1))

    def get(self, key: str) -> Any:
        return self.values.get(key)


def write_atomically(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    os.replace(part, path)


def run_experiment(experiment: Experiment, console: Console, fresh: bool = False, verbose: bool = False) -> None:
    """Run what is left of an experiment and print what came of it.

    Raises:
        InputError: data, sizes, store or cluster do not fit the experiment.
        PretrainFailed, SweepFailed: the run failed; it can be resumed with the same command.
    """
    started = time.monotonic()
    folder = experiment.folder
    if fresh and folder.exists():
        kept = folder.with_name(f"{folder.name}.old-{int(folder.stat().st_mtime)}")
        with locked(folder):  # not away from under a process that works in it
            folder.rename(kept)
        console.print(f"Kept the earlier results in {short_path(kept)}")
    if experiment.miniature is None and not folder.exists():
        _check_targets(experiment)
    with locked(folder):
        _run(experiment, console, verbose, started)


def _check_targets(experiment: Experiment) -> None:
    """Find a wrong climatology now, and not after hours of embedding; a miniature's is there when that is made."""
    if experiment.climate is not None and experiment.kind in ("climate", "pipeline"):
        from copernicus.platform.climate_stage import check_climate

        check_climate(experiment.climate)


def _run(experiment: Experiment, console: Console, verbose: bool, started: float) -> None:
    folder = experiment.folder
    state = State(folder)
    tracker = Tracker(experiment.tracking.uri, experiment.tracking.experiment, Path(experiment.output) / "artifacts")
    console.print(f"[bold]{experiment.name}[/] ({experiment.kind}) in {short_path(folder)}")
    if state.get("done") and not product_missing(experiment):
        console.print("This experiment is finished; its results follow. [dim]--fresh runs it anew.[/]")
        _closing(experiment, state, tracker, console)
        return
    sections = [n for n in ("miniature", *STAGES) if getattr(experiment, n) is not None]
    if experiment.kind != "pipeline":
        sections = [n for n in sections if n in ("miniature", experiment.kind)]
    seconds: dict[str, float] = state.get("seconds") or {}

    if experiment.miniature is not None:
        with _stage("miniature", sections, seconds, console):
            make_miniature(experiment.miniature, console)

    if experiment.miniature is not None:
        _check_targets(experiment)
    tags = {"kind": experiment.kind, "experiment": experiment.name, "fingerprint": experiment.fingerprint}
    tags |= {"mlflow.source.git.commit": git_commit(), "git_commit": git_commit()}
    failed: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(ray_session(verbose))
        refuse_unshared([folder, *([Path(experiment.sweep.cache)] if experiment.sweep else [])])
        earlier = state.get("run_id")
        parent = tracker.start(experiment.name, tags, run_id=earlier)
        stack.enter_context(parent.ending())
        state.set(run_id=parent.id)
        if parent.id == earlier:
            console.print(f"Going on with the MLflow run {parent.id}")
        if tracker.uri.startswith("http"):
            console.print(f"MLflow {tracker.run_link(parent)}", soft_wrap=True, highlight=False)
        parent.parameters(experiment.parameters())
        parent.text(experiment.to_yaml(), "experiment.yaml")
        checkpoint: Path | None = None
        if "pretrain" in sections:
            with _stage("pretrain", sections, seconds, console):
                assert experiment.pretrain is not None
                checkpoint = _pretrain(experiment, experiment.pretrain, state, tracker, parent, console)
            state.set(seconds=seconds)
        if "sweep" in sections:
            with _stage("sweep", sections, seconds, console):
                assert experiment.sweep is not None
                failed = _sweep(experiment, experiment.sweep, checkpoint, state, tracker, parent, console)
            state.set(seconds=seconds)
        if "embed" in sections:
            with _stage("embed", sections, seconds, console):
                assert experiment.embed is not None
                _embed(experiment, experiment.embed, checkpoint, state, tracker, parent, console)
            state.set(seconds=seconds)
        if "climate" in sections:
            with _stage("climate", sections, seconds, console):
                assert experiment.climate is not None
                _climate(experiment, experiment.climate, state, tracker, parent, console)
            state.set(seconds=seconds)
        parent.metrics({f"seconds/{name}": s for name, s in seconds.items()})
    state.set(done=not failed, seconds=seconds)
    _closing(experiment, state, tracker, console, time.monotonic() - started)
    if failed:
        from copernicus.platform.sweep import SweepFailed

        raise SweepFailed(f"{len(failed)} cells failed: {', '.join(failed)}")


def refuse_unshared(folders: list[Path]) -> None:
    """Refuse folders that are not the same on every node of the cluster.

    Raises:
        InputError: names the first few nodes.
    """
    for folder in folders:
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        # Who says nothing may have just died, and is asked again when it is given work.
        problems = [problem for problem in not_shared(folder.absolute()) if SILENT not in problem]
        for path in made:
            with contextlib.suppress(OSError):  # somebody uses it by now
                path.rmdir()
        if problems:
            more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
            raise InputError(
                f"output: {'; '.join(problems[:3])}{more}. Checkpoints and results must outlive any node: give a folder that "
                "all of them share (output and sweep.cache; a cluster's files set COPERNICUS_STORAGE)"
            )


@contextlib.contextmanager
def locked(folder: Path, work: str = "experiment") -> Iterator[None]:
    """One process at a time works in a folder; the lock goes with the process, however it ends."""
    created = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output: cannot make the folder {folder}: {error.strerror}") from None
    with open(folder / ".lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise InputError(
                f"{short_path(folder)}: this {work} is being run by another process ({file.read().strip() or 'unknown'}); "
                "wait for it, or end it first"
            ) from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        try:
            yield
        except InputError:
            if created and [p.name for p in folder.iterdir()] == [".lock"]:  # wrong input leaves nothing behind
                shutil.rmtree(folder)
            raise


def make_miniature(settings: Miniature, console: Console) -> None:
    """Write the miniature Earth, or find it written already."""
    from copernicus.datasets.miniature import write_miniature

    with progress_bar(console, "writing") as update:
        summary = write_miniature(
            settings.out,
            settings.grids,
            settings.seed,
            settings.scale,  # type: ignore[arg-type]
            workers=os.cpu_count() or 1,
            progress=lambda what, done, total: update(done, total, what),
            tasks=settings.task_names(),
        )
    from copernicus.datasets.miniature.preview import preview

    picture = summary.folder / "preview.png"
    # The manifest is written again whenever tasks are added, which the picture then lacks.
    if not picture.exists() or picture.stat().st_mtime_ns < (summary.folder / "miniature.json").stat().st_mtime_ns:
        preview(summary.folder)
    tasks = ", ".join(f"{name} {sum(splits.values())}" for name, splits in summary.samples.items()) or "none"
    console.print(
        f"  {summary.grids} grids in {len(summary.shards)} shards; tasks: {tasks}; in {short_path(summary.folder)}",
        soft_wrap=True,
    )
    console.print(f"  look at {short_path(picture)}")


def _pretrain(
    experiment: Experiment, settings: Pretrain, state: State, tracker: Tracker, parent: Run, console: Console
) -> Path:
    from copernicus.platform.pictures import reconstructions
    from copernicus.platform.pretrain import PretrainResult, pretrain

    if (done := state.get("checkpoint")) is not None and Path(done).exists():
        console.print(f"  done before: {short_path(Path(done))}")
        return Path(done)
    single = experiment.kind == "pretrain"
    tags = {"kind": "pretrain", "experiment": experiment.name, "seed": experiment.seed, "model": settings.model.name}
    run = parent if single else tracker.start("pretrain", tags, parent, state.get("pretrain_run_id"))
    state.set(pretrain_run_id=run.id)
    logged = tracker.last_step(run, "train/loss")
    rows: list[tuple[int, dict[str, float]]] = []
    written = time.monotonic()
    silent = False
    held: list[Any] = []

    def flush() -> None:
        nonlocal written
        written = time.monotonic()
        while rows:
            run.metric_rows(rows[:ROWS_AT_ONCE])
            del rows[:ROWS_AT_ONCE]

    def on_metrics(step: int, metrics: dict[str, float]) -> bool:
        # After a failure the steps since the checkpoint come again, with the same figures: they are logged once.
        nonlocal logged, silent
        if step > logged:
            rows.append((step, metrics))
            logged = step
        if time.monotonic() - written > 2:
            try:
                flush()
                silent = False
            except store_errors() as error:
                if not may_pass(error):
                    raise
                if not silent:
                    console.print("  [yellow]note[/] training goes on; its figures are recorded when MLflow answers")
                silent = True
        return not rows

    def on_plan(plan: Any, train: Any, held_out: Any) -> None:
        held.extend([plan, held_out])
        if state.get("data_fingerprint") not in (None, train.fingerprint):
            raise InputError(
                "pretrain.shards: the shards have changed since this run began; put them back, or give --fresh to start anew"
            )
        names = variables(plan.sensors)
        digests = plan.language.digests(names)
        if state.get("language") not in (None, digests):
            raise InputError(
                "pretrain.language: the embeddings have changed since this run began; put them back, or give --fresh to "
                "start anew"
            )
        state.set(data_fingerprint=train.fingerprint, language=digests)
        run.tags({"data_fingerprint": train.fingerprint})
        if not single:
            run.parameters({k: v for k, v in experiment.parameters().items() if k.startswith(("pretrain.", "seed"))})
        console.print(
            f"  {len(train)} grids to train on, {len(held_out)} held out, {len(plan.sensors)} sensors, "
            f"{'-'.join(map(str, sorted(set(settings.worker_range))))} workers, global batch {settings.batch_size}"
        )
        if autoscales():
            console.print("  the cluster brings nodes as they are asked for; the first step waits for them")
        if names:
            run.parameters({"language": plan.language.describe(names)})
        for warning in filter(None, (plan.warning, language_warning(plan.language, names))):
            console.print(f"  [yellow]warning[/] {warning}", soft_wrap=True)
        for problem in plan.problems[:MOST_SHOWN]:
            console.print(f"  [yellow]skipped[/] {problem}")
        if len(plan.problems) > MOST_SHOWN:
            console.print(f"  ... and {len(plan.problems) - MOST_SHOWN} more: skipped.txt will name them all")

    with contextlib.nullcontext() if single else run.ending():
        with progress_bar(console, "training") as update:

            def on_progress(step: int, steps: int, metrics: dict[str, float]) -> None:
                rate, loss = metrics.get("train/samples_per_s"), metrics.get("train/loss")
                note = f"loss {loss:.3f}  {rate:.0f} samples/s" if loss is not None and rate is not None else ""
                update(step, steps, note)

            try:
                result: PretrainResult = pretrain(
                    settings, experiment.seed, experiment.folder, on_metrics, on_progress, on_plan,
                    on_index=lambda done, total, note: update(done, total, f"shards indexed {note}"),
                    on_note=lambda text: console.print(f"  [yellow]note[/] {escape(text)}", soft_wrap=True),
                )  # fmt: skip
            except BaseException:
                # On the way out nobody waits for a store that does not answer; the checkpoint keeps what it lacks.
                patience, tracker.patience = tracker.patience, 0.0
                with contextlib.suppress(*store_errors()):
                    flush()
                tracker.patience = patience
                raise
            flush()
        pictures = reconstructions(held[0], held[1], result.checkpoint, experiment.folder / "pictures")
        for picture in pictures:
            run.artifact(picture, "reconstructions")
        if result.skipped:
            write_atomically(experiment.folder / "skipped.txt", "".join(f"{p}\n" for p in result.skipped))
            run.artifact(experiment.folder / "skipped.txt")
            counts = Counter(p.reason for p in result.skipped)
            console.print(
                f"  [yellow]skipped[/] {', '.join(f'{n} {reason}' for reason, n in counts.items())}: "
                f"named in {short_path(experiment.folder / 'skipped.txt')}"
            )
    name, history = "held-out", tracker.history(run, "val/loss")
    if not history:
        name, history = "training", tracker.history(run, "train/loss")
    console.print(
        f"  {result.steps} steps, {result.samples} samples; {name} loss {history[0][1]:.3f} -> {history[-1][1]:.3f}; "
        f"checkpoint {short_path(result.checkpoint)}"
    )
    state.set(checkpoint=str(result.checkpoint))
    return result.checkpoint


def _sweep(
    experiment: Experiment,
    settings: Sweep,
    checkpoint: Path | None,
    state: State,
    tracker: Tracker,
    parent: Run,
    console: Console,
) -> dict[str, str]:
    """Runs the sweep; returns the errors of the cells that failed."""
    from copernicus.platform.sweep_stage import run_sweep

    def run_for(tags: dict[str, str]) -> Run:
        if experiment.kind == "sweep":
            return parent
        run = tracker.start("sweep", tags, parent, state.get("sweep_run_id"))
        state.set(sweep_run_id=run.id)
        return run

    return run_sweep(experiment, settings, checkpoint, run_for, tracker, parent, console)


def product_missing(experiment: Experiment) -> bool:
    """Whether files of the embedding product are not there: lost, or in a format that is asked for after all else is done."""
    if experiment.embed is None or experiment.kind not in ("embed", "pipeline"):
        return False
    from copernicus.platform.embed_stage import product_files

    return not all(path.exists() for path in product_files(experiment.folder / "embed", experiment.embed.formats))


def _embed(
    experiment: Experiment,
    settings: Embed,
    checkpoint: Path | None,
    state: State,
    tracker: Tracker,
    parent: Run,
    console: Console,
) -> None:
    from copernicus.platform.embed_stage import run_embed

    if state.get("embedded") and not product_missing(experiment):
        console.print(f"  done before: {short_path(experiment.folder / 'embed')}")
        return
    single = experiment.kind == "embed"
    tags = {"kind": "embed", "experiment": experiment.name}
    run = parent if single else tracker.start("embed", tags, parent, state.get("embed_run_id"))
    state.set(embed_run_id=run.id)

    if not single:
        run.parameters({k: v for k, v in experiment.parameters().items() if k.startswith("embed.")})
    with contextlib.nullcontext() if single else run.ending():
        run_embed(experiment, settings, checkpoint, run, console)
    state.set(embedded=True)


def _climate(
    experiment: Experiment, settings: Climate, state: State, tracker: Tracker, parent: Run, console: Console
) -> None:
    from copernicus.platform.climate_stage import run_climate

    single = experiment.kind == "climate"
    tags = {"kind": "climate", "experiment": experiment.name}
    run = parent if single else tracker.start("climate", tags, parent, state.get("climate_run_id"))
    state.set(climate_run_id=run.id)
    embedded = experiment.folder / "embed" if state.get("embedded") else None
    with contextlib.nullcontext() if single else run.ending():
        run_climate(experiment, settings, embedded, run, console)


def _closing(
    experiment: Experiment, state: State, tracker: Tracker, console: Console, seconds: float | None = None
) -> None:
    folder = experiment.folder
    has_scores = (folder / "leaderboard.json").exists()
    compare = [state.get("pretrain_run_id")]
    if has_scores:
        leaderboard = read_leaderboard(folder)
        console.print()
        for shown in terminal(leaderboard):
            console.print(shown)
        compare = [s.run_id for s in leaderboard.scores]
    console.print()
    stages = state.get("seconds") or {}
    if seconds is not None:
        parts = ", ".join(f"{name} {spell_time(s)}" for name, s in stages.items())
        ended = "[bold green]Done[/]" if state.get("done") else "[bold red]Ended with failures[/]"
        console.print(f"{ended} in {spell_time(seconds)} ({parts}).")
    run = tracker.find(state.get("run_id"))
    lines = []
    if has_scores:
        lines.append(("Leaderboard", f"{short_path(folder / 'leaderboard.html')} (open it), .md, .csv, .png beside it"))
    if state.get("embedded"):
        lines.append(("Embeddings", f"{short_path(folder / 'embed')}/ (images/, grids.parquet, map.*)"))
        lines.append(("  neighbours", f"copernicus similar {short_path(folder)} --lon LON --lat LAT"))
    if (folder / "pictures").exists():
        lines.append(("Pictures", f"{short_path(folder / 'pictures')}/"))
    if not tracker.uri.startswith("http"):
        uri = "" if tracker.uri == "sqlite:///mlflow.db" else f" --uri {mask(tracker.uri)}"
        lines.append(("Open MLflow", f"copernicus ui{uri}"))
    if run is not None:
        lines.append(("  this run", tracker.run_link(run)))
    if has_scores and run is not None and experiment.sweep is not None:
        sweep_id = state.get("sweep_run_id") or run.id
        finals = f"tags.sweep_id = '{sweep_id}' and tags.role = 'final'"
        shown = ("task", "encoder", *(experiment.sweep.search or ()))
        lines.append(("  trials", tracker.view_link(f"sweep-{sweep_id}", finals, shown, chart=True)))
    if compare[0] and len(compare) <= MOST_COMPARED:
        lines.append(("  compare", tracker.compare_link(compare)))
    for title, value in lines:
        console.print(f"{title:<12} {value}", soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def _stage(name: str, sections: list[str], seconds: dict[str, float], console: Console) -> Iterator[None]:
    titles = {
        "miniature": "miniature Earth",
        "pretrain": "pretraining",
        "embed": "embedding",
        "climate": "climate probe",
    }
    console.print(f"[bold]{sections.index(name) + 1}/{len(sections)} {titles.get(name, name)}[/]")
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started
