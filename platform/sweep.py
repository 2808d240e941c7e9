"""The sweep: cells (task x encoder) side by side under one coordinator, which owns the cluster's share of each.

Whatever is finished is in the journal before anything else happens, so that a resumed sweep repeats none of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from copernicus.datasets.bench import get_task
from copernicus.datasets.sensors import InputError
from copernicus.models.sources import is_remote
from copernicus.platform.cell import Cell, CellRunner, last_line
from copernicus.platform.checkpoint import trained_language
from copernicus.platform.journal import FINAL, FINISHED, Journal, Trial
from copernicus.platform.language import language_warning, open_language, variables
from copernicus.platform.schema import Encoder, Pretrain, Sweep
from copernicus.platform.session import autoscales

POLL = 0.2  # seconds between looks at what the cells have to say
LIVES = 2  # times a cell whose process dies is begun
ASKED_FOR = 8
"""Trials at once for which a cluster that brings nodes by itself is asked, where sweep.max_concurrent says nothing."""
MOST_CELLS = (
    12  # at once: each is a process of half a GB on the driver's machine; their trials have the rest of the slots
)


class SweepFailed(RuntimeError):
    """No cell gave a score."""


def cells(settings: Sweep, pretrained: Pretrain | None, checkpoint: Path | None) -> list[Cell]:
    """All cells, task by task."""

    def cell(task: str, name: str, encoder: Encoder) -> Cell:
        model = encoder.model or (pretrained.model if pretrained else None)
        assert model is not None, "checked when the experiment was loaded"
        weights, language = encoder.weights, encoder.language
        if weights == "pretrain":
            assert pretrained is not None, "checked when the experiment was loaded"
            weights, language = str(checkpoint), language or pretrained.language
        protocol = encoder.protocol or settings.protocol
        weights, language = absolute(weights), language and absolute(language)
        return Cell(task, name, model, weights, encoder.seed, language, protocol, encoder.blocks, encoder.lora_rank)

    return [cell(task, name, encoder) for task in settings.tasks for name, encoder in settings.encoders.items()]


def absolute(source: str) -> str:
    """A path that processes in other directories find; sources of other kinds as they are."""
    return source if source == "none" or is_remote(source) else str(Path(source).absolute())


def cells_language(settings: Sweep, plan: list[Cell]) -> tuple[dict[str, str], list[str]]:
    """Of the cells whose task is one of variables: what their embeddings are, by cell; and warnings, each once.

    Raises:
        InputError: embeddings or weights that cannot be read.
    """
    described: dict[str, str] = {}
    warnings: list[str] = []
    for cell in plan:
        names = variables(get_task(cell.task).sensors(settings.preset))  # type: ignore[arg-type]
        if names:
            table = open_language(cell.language)
            described[cell.key] = table.describe(names)
            trained = {} if cell.weights == "none" else trained_language(cell.weights)
            warning = language_warning(table, names, trained)
            line = f"encoder {cell.name}: {warning}"
            if warning and line not in warnings:
                warnings.append(line)
    return described, warnings


def trial_slots(settings: Sweep, nodes: list[dict[str, float]]) -> int:
    """How many trials the cluster's nodes can run at once, or the sweep's own limit where that is lower. A cluster that
    brings nodes by itself is asked for as many as the sweep's limit, or `ASKED_FOR`.

    Raises:
        InputError: no node has the resources of one trial.
    """
    wanted = {"CPU": settings.cpus_per_trial, "GPU": settings.gpus_per_trial}
    slots = sum(
        min(math.floor(node.get(name, 0.0) / amount + 1e-9) for name, amount in wanted.items() if amount)
        for node in nodes
    )
    if autoscales():
        return settings.max_concurrent or max(slots, ASKED_FOR)
    if slots < 1:
        most = [max((node.get(name, 0.0) for node in nodes), default=0.0) for name in wanted]
        raise InputError(
            f"sweep: a trial asks for {settings.cpus_per_trial:g} CPUs and {settings.gpus_per_trial:g} GPUs, which no node "
            f"has (the largest: {most[0]:g} and {most[1]:g}); lower sweep.cpus_per_trial or sweep.gpus_per_trial"
        )
    return min(slots, settings.max_concurrent or slots)


def sweep(
    settings: Sweep,
    plan: list[Cell],
    seed: int,
    folder: Path,
    on_trial: Callable[[Cell, Trial], None],
    on_stage: Callable[[Cell, str], None] = lambda cell, stage: None,
) -> tuple[Journal, dict[str, str]]:
    """Run what is unfinished of all cells, as many at once as there is room for; one that fails stops no other.

    ``on_trial(cell, trial)`` hears of every trial, those of earlier attempts first; it may hear of one again.
    ``on_stage(cell, stage)`` hears what a cell is doing. Returns all trials, and the error of each failed cell by its key.

    Raises:
        InputError: the cluster has no room for one trial.
        SweepFailed: every cell failed.
    """
    # Workers and Tune's trials run in other directories.
    settings = dataclasses.replace(settings, data=absolute(settings.data), cache=absolute(settings.cache))
    folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(folder / "trials.jsonl")
    _same_data(settings, plan, folder / "data.json", journal)
    by_key = {cell.key: cell for cell in plan}
    for trial in list(journal.trials.values()):
        if trial.cell in by_key:
            on_trial(by_key[trial.cell], trial)
    failed: dict[str, str] = {}
    waiting = deque(cell for cell in plan if _unfinished(cell, settings, seed, journal))
    lives = dict.fromkeys(by_key, LIVES)
    if waiting:
        with _pool(settings, len(waiting)) as pool:

            def hear() -> None:
                for key, kind, what in pool.heard():
                    if kind == "trial":
                        journal.add(what)
                        on_trial(by_key[key], what)
                    else:
                        on_stage(by_key[key], what)

            while waiting or pool.running:
                while waiting and pool.room:
                    cell = waiting.popleft()
                    done = [t for t in journal.trials.values() if t.cell == cell.key]
                    pool.start(cell, settings, seed, folder / cell.key, done, len(waiting))
                ended = pool.wait()
                hear()  # all that the ended ones have said before they ended
                for cell, error in ended:
                    lives[cell.key] -= 1
                    if error is None:
                        on_stage(cell, "done")
                    elif pool.died(error) and lives[cell.key]:
                        waiting.append(cell)
                    else:
                        failed[cell.key] = last_line(error)
                        trace = "".join(traceback.format_exception(error))
                        (folder / f"{cell.key}-error.txt").write_text(trace)
                        on_stage(cell, "failed")
    if not any(t.role == FINAL and t.status == FINISHED and t.cell in by_key for t in journal.trials.values()):
        key, message = next(iter(failed.items()))
        raise SweepFailed(f"every cell failed; {key}: {message}")
    return journal, failed


def _same_data(settings: Sweep, plan: list[Cell], path: Path, journal: Journal) -> None:
    """Scores of changed data must not be averaged with those from before.

    Raises:
        InputError: the files of a task that has trials already are others than when the sweep began.
    """
    known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
    begun = {trial.cell for trial in journal.trials.values()}
    for name in dict.fromkeys(cell.task for cell in plan):
        task, found = get_task(name), hashlib.sha256()
        try:
            for split in ("train", "val", "test"):
                dataset = task.open(settings.data, split, settings.preset, settings.image_size.get(name))  # type: ignore[arg-type]
                found.update(dataset.fingerprint().encode())
        except (InputError, OSError):  # its cells will say what is wrong
            continue
        if known.get(name, found.hexdigest()) != found.hexdigest() and any(
            cell.key in begun for cell in plan if cell.task == name
        ):
            raise InputError(
                f"sweep.data: the files of {name} have changed since this sweep began; put them back, or give --fresh to "
                "start anew"
            )
        known[name] = found.hexdigest()
    path.write_text(json.dumps(known, indent=1))


def _unfinished(cell: Cell, settings: Sweep, seed: int, journal: Journal) -> bool:
    tested = {t.number for t in journal.of(cell.key, FINAL) if t.status == FINISHED}
    return not tested >= set(cell.seeds(settings, seed))


class _Pool:
    """Processes that run cells, as many as may run at once, and the queue through which they speak."""

    def __init__(self, slots: int, width: int, events: Any):
        self.slots, self.width, self.events = slots, width, events
        self.idle: list[Any] = []
        self.running: dict[Any, tuple[Cell, Any]] = {}

    @property
    def room(self) -> bool:
        return len(self.running) < self.width

    def start(self, cell: Cell, settings: Sweep, seed: int, folder: Path, done: list[Trial], left: int) -> None:
        """``left``: cells that are not begun, this one not among them. The slots are shared out among those at work."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        folder.mkdir(parents=True, exist_ok=True)
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        # The cell's process only waits: its trials have the CPUs.
        kind: Any = ray.remote(CellRunner)
        kind = kind.options(num_cpus=0, scheduling_strategy=here)
        runner = self.idle.pop() if self.idle else kind.remote()
        share = max(1, self.slots // min(self.width, len(self.running) + 1 + left))
        self.running[runner.run.remote(cell, settings, seed, folder, done, share, self.events)] = cell, runner

    def wait(self) -> list[tuple[Cell, BaseException | None]]:
        """Cells that have ended since the last call, each with what went wrong."""
        import ray

        ready, _ = ray.wait(list(self.running), num_returns=len(self.running), timeout=POLL)
        ended: list[tuple[Cell, BaseException | None]] = []
        for ref in ready:
            cell, runner = self.running.pop(ref)
            try:
                ray.get(ref)
            except Exception as error:
                ended.append((cell, error))
                if not self.died(error):
                    self.idle.append(runner)
            else:
                ended.append((cell, None))
                self.idle.append(runner)
        return ended

    def heard(self) -> list[tuple[str, str, Any]]:
        return self.events.get_nowait_batch(self.events.qsize())

    @staticmethod
    def died(error: BaseException) -> bool:
        from ray.exceptions import RayActorError

        return isinstance(error, RayActorError)


@contextlib.contextmanager
def _pool(settings: Sweep, cells: int) -> Iterator[_Pool]:
    import ray
    from ray.util.queue import Queue

    slots = trial_slots(settings, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    pool = _Pool(slots, min(cells, slots, MOST_CELLS), Queue(actor_options={"num_cpus": 0}))
    try:
        yield pool
    finally:
        for runner in [*pool.idle, *(runner for _, runner in pool.running.values())]:
            ray.kill(runner)
        pool.events.shutdown()
