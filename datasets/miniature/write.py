"""Writes a miniature Earth: pretraining shards and four benchmark tasks; same bytes on any number of workers."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from copernicus.datasets.miniature.planet import Planet
from copernicus.datasets.miniature.pretrain import PretrainScale, choose_grids, make_grid
from copernicus.datasets.miniature.tasks import TASKS, TaskScale
from copernicus.datasets.sensors import InputError
from copernicus.datasets.shards import shard_path, write_shard

VERSION = 1
"""Of the planet. A change of the bytes that a seed gives raises it."""

ScaleName = Literal["tiny", "small", "full"]


@dataclass(frozen=True)
class Scale:
    """Sizes of arrays and numbers of samples."""

    pretrain: PretrainScale
    tasks: dict[str, TaskScale]


def _splits(train: int, val: int, test: int) -> tuple[tuple[str, int], ...]:
    return (("train", train), ("val", val), ("test", test))


def _scale(pretrain: PretrainScale, s3: int, s1: int, classify: tuple, dense: tuple) -> Scale:
    return Scale(
        pretrain,
        {
            "eurosat_s2": TaskScale(64, _splits(*classify)),
            "cloud_s3": TaskScale(s3, _splits(*dense)),
            "flood_s1": TaskScale(s1, _splits(*dense)),
            "aq_no2_s5p": TaskScale(56, _splits(*dense)),
        },
    )


_SMALL = PretrainScale(
    patches=1,
    local_dates=2,
    s3_dates=2,
    s5p_dates=4,
    local_size=64,
    s3_size=32,
    s5p_size=28,
    dem_size=192,
    grids_per_shard=32,
)
_FULL = PretrainScale(
    patches=4,
    local_dates=4,
    s3_dates=8,
    s5p_dates=12,
    local_size=264,
    s3_size=96,
    s5p_size=28,
    dem_size=960,
    grids_per_shard=100,
)
SCALES: dict[str, Scale] = {
    "tiny": _scale(_SMALL, 64, 64, (40, 20, 20), (12, 6, 6)),
    "small": _scale(_SMALL, 64, 64, (180, 80, 80), (60, 24, 24)),
    "full": _scale(_FULL, 256, 224, (1600, 500, 500), (300, 100, 100)),
}

Progress = Callable[[str, int, int], None]
"""Called with what is being written ("pretrain" or a task's name), how much of it is done, and how much there is."""


@dataclass(frozen=True)
class MiniatureSummary:
    """What lies where: the shards, the folder that holds the tasks' folders, and how many samples each split has."""

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
) -> MiniatureSummary:
    """Writes ``out/pretrain/example-*.tar`` and ``out/bench/<task>/``, unless this very miniature is there already.

    The same (grids, seed, scale) give the same bytes whatever the number of workers, on one kind of machine (the last
    bit of numpy's functions may differ between processors). A run that was interrupted is done again from the start.

    Args:
        grids: number of pretraining grids.
        scale: "full" has the published array sizes (about 48 MB a grid); "small" the same structure in smaller arrays
            (about 0.6 MB a grid); "tiny" the same with few benchmark samples, for trying things out.

    Raises:
        InputError: a number out of range, or the folder holds something else.
    """
    out = Path(out)
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
    if manifest_path.exists():
        found = _read_manifest(manifest_path)
        if {key: found.get(key) for key in wanted} != wanted:
            raise InputError(f"miniature: {out} holds another miniature ({found}); give another folder or delete it")
        if found.get("complete"):
            return _summary(out, grids, scale)
    elif out.exists() and any(out.iterdir()):
        raise InputError(f"miniature: folder {out} is not empty; give another folder or empty it")

    out.mkdir(parents=True, exist_ok=True)
    manifest_path.write_text(json.dumps(wanted | {"complete": False}))
    report = progress or (lambda what, done, total: None)
    with _Pool(workers) as pool:
        _write_pretrain(pool, out / "pretrain", grids, seed, SCALES[scale].pretrain, report)
        for task, task_scale in SCALES[scale].tasks.items():
            _write_task(pool, out / "bench", task, seed, task_scale, report)
    manifest_path.write_text(json.dumps(wanted | {"complete": True}))
    return _summary(out, grids, scale)


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"miniature: {path} cannot be read ({error}); give another folder or delete it") from None
    if not isinstance(found, dict):
        raise InputError(f"miniature: {path} is not a miniature's manifest; give another folder or delete it")
    return found


def _summary(out: Path, grids: int, scale: str) -> MiniatureSummary:
    per_shard = SCALES[scale].pretrain.grids_per_shard
    paths = [shard_path(out / "pretrain", i) for i in range(-(-grids // per_shard))]
    samples = {task: dict(task_scale.splits) for task, task_scale in SCALES[scale].tasks.items()}
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


def _write_task(pool: _Pool, bench: Path, task: str, seed: int, scale: TaskScale, report: Progress) -> None:
    root = bench / TASKS[task].directory
    root.mkdir(parents=True, exist_ok=True)
    total = sum(count for _, count in scale.splits)
    entries = []
    report(task, 0, total)
    for entry in pool.map(partial(_write_one_sample, task, seed, scale.size, root), range(total), 4):
        entries.append(entry)
        report(task, len(entries), total)
    for split, count in scale.splits:
        part, entries = entries[:count], entries[count:]
        path = root / TASKS[task].split_file.format(split)
        path.write_text(json.dumps(dict(part)) if path.suffix == ".json" else "".join(f"{line}\n" for line in part))
