"""Writes a miniature Earth: pretraining shards and benchmark tasks; same bytes on any number of workers."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from copernicus.datasets.miniature.climate import CLIMATE_FILE, write_climate
from copernicus.datasets.miniature.planet import Planet
from copernicus.datasets.miniature.pretrain import PretrainScale, choose_grids, make_grid
from copernicus.datasets.miniature.scales import SCALES, Scale, ScaleName
from copernicus.datasets.miniature.tasks import FOLDERS, TASKS, TaskFolder, TaskScale, check_tasks
from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import shard_path, write_shard

VERSION = 1
"""Of the planet. A change of the bytes that a seed gives raises it."""

Progress = Callable[[str, int, int], None]
"""Called with what is being written ("pretrain" or a folder's tasks), how much is done, and how much there is."""


@dataclass(frozen=True)
class MiniatureSummary:
    """What lies where: the shards, the folder that holds the tasks' folders, and how many samples each split of each
    task has that was asked for."""

    folder: Path
    shards: list[Path]
    bench: Path
    grids: int
    samples: dict[str, dict[str, int]]


def write_miniature(
    out: Path | str,
    grids: int,
    seed: int,
    scale: ScaleName = "small",
    workers: int = 1,
    progress: Progress | None = None,
    tasks: Sequence[str] | None = None,
) -> MiniatureSummary:
    """Writes ``out/pretrain/example-*.tar``, ``out/climate.parquet`` and ``out/bench/<folder>/``, of these what is not there
    already.

    The same (grids, seed, scale) give the same bytes whatever the number of workers and the tasks, on one kind of
    machine (the last bit of numpy's functions may differ between processors). ``miniature.json`` says which tasks are
    written; others can be asked for later. What an interrupted run had begun is done again.

    Args:
        grids: number of pretraining grids.
        scale: "full" has the published array sizes (about 48 MB a grid); "small" the same structure in smaller arrays
            (about 0.6 MB a grid); "tiny" the same with few benchmark samples, for trying things out.
        tasks: names of benchmark tasks; all fifteen where none are given. Tasks that share a folder come together.

    Raises:
        InputError: a number out of range, a task that does not exist, or the folder holds something else.
    """
    out = Path(out)
    asked = list(TASKS) if tasks is None else tasks
    check_tasks(asked)
    if grids < 1 or workers < 1 or seed < 0:
        raise InputError(
            f"miniature: grids={grids}, workers={workers}, seed={seed}; grids and workers start at 1, seeds at 0"
        )
    if scale not in SCALES:
        raise InputError(f"miniature: no scale {scale!r}; the scales are {', '.join(SCALES)}")
    manifest_path = out / "miniature.json"
    wanted = {"miniature": VERSION, "grids": grids, "seed": seed, "scale": scale}
    if out.exists() and not out.is_dir():
        raise InputError(f"miniature: {out} is a file; give a folder")
    found: dict[str, Any] = {}
    if manifest_path.exists():
        found = _read_manifest(manifest_path)
        if {key: found.get(key) for key in wanted} != wanted:
            raise InputError(f"miniature: {out} holds another miniature ({found}); give another folder or delete it")
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"miniature: folder {out} is not empty; give another folder or empty it")

    out.mkdir(parents=True, exist_ok=True)
    manifest = wanted | {"pretrain": found.get("pretrain", False), "tasks": found.get("tasks", [])}
    sizes: Scale = SCALES[scale]
    report = progress or (lambda what, done, total: None)
    folders = [folder for folder in FOLDERS if set(folder.tasks) & set(asked)]
    missing = [folder for folder in folders if not set(folder.tasks) <= set(manifest["tasks"])]
    if not found:
        _write_manifest(manifest_path, manifest)
    with _Pool(workers) as pool:
        if not manifest["pretrain"]:
            _write_pretrain(pool, out / "pretrain", grids, seed, sizes.pretrain, report)
            manifest["pretrain"] = True
            _write_manifest(manifest_path, manifest)
        if not (out / CLIMATE_FILE).exists():
            write_climate(Planet(seed), choose_grids(Planet(seed), grids), out / CLIMATE_FILE)
        for folder in missing:
            _write_task(pool, out / "bench", folder, seed, sizes.tasks[folder.tasks[0]], report)
            manifest["tasks"] = [task for task in TASKS if task in (*manifest["tasks"], *folder.tasks)]
            _write_manifest(manifest_path, manifest)
    return _summary(out, grids, scale, asked)


def _write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Whole or not at all: a kill leaves the old one."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(json.dumps(manifest))
    part.replace(path)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"miniature: {path} cannot be read ({error}); give another folder or delete it") from None
    if not isinstance(found, dict):
        raise InputError(f"miniature: {path} is not a miniature's manifest; give another folder or delete it")
    return found


def _summary(out: Path, grids: int, scale: str, asked: Sequence[str]) -> MiniatureSummary:
    per_shard = SCALES[scale].pretrain.grids_per_shard
    paths = [shard_path(out / "pretrain", i) for i in range(-(-grids // per_shard))]
    samples = {task: dict(SCALES[scale].tasks[task].splits) for task in TASKS if task in asked}
    return MiniatureSummary(out, paths, out / "bench", grids, samples)


class _Pool:
    """An ordered map over processes, or in this one."""

    def __init__(self, workers: int) -> None:
        # Spawned, not forked: the caller may hold threads (torch, Ray) that a fork would break.
        context = multiprocessing.get_context("spawn")
        self._executor = ProcessPoolExecutor(workers, mp_context=context) if workers > 1 else None

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._executor:
            self._executor.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], Any], jobs: Iterable[Any], chunk: int) -> Iterator[Any]:
        return self._executor.map(function, jobs, chunksize=chunk) if self._executor else map(function, jobs)


def _write_one_shard(job: tuple[int, PretrainScale, Path, tuple[int, ...]]) -> int:
    seed, scale, path, indices = job
    planet = Planet(seed)
    return write_shard((make_grid(planet, index, scale) for index in indices), path)


def _write_pretrain(pool: _Pool, folder: Path, grids: int, seed: int, scale: PretrainScale, report: Progress) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    indices = choose_grids(Planet(seed), grids)
    size = scale.grids_per_shard
    jobs = [
        (seed, scale, shard_path(folder, number), tuple(indices[number * size : (number + 1) * size]))
        for number in range(-(-grids // size))
    ]
    done = 0
    report("pretrain", 0, grids)
    for written in pool.map(_write_one_shard, jobs, 1):
        done += written
        report("pretrain", done, grids)


def _write_one_sample(task: str, seed: int, size: int, root: Path, number: int) -> Any:
    return TASKS[task].write_sample(Planet(seed), size, number, root)


def _write_task(pool: _Pool, bench: Path, folder: TaskFolder, seed: int, scale: TaskScale, report: Progress) -> None:
    root = bench / folder.directory
    root.mkdir(parents=True, exist_ok=True)
    total, what = sum(count for _, count in scale.splits), ", ".join(folder.tasks)
    samples = []
    report(what, 0, total)
    write = partial(_write_one_sample, folder.tasks[0], seed, scale.size, root)
    for sample in pool.map(write, range(total), 4):
        samples.append(sample)
        report(what, len(samples), total)
    for split, count in scale.splits:
        part, samples = samples[:count], samples[count:]
        folder.write_split(root, split, part)
