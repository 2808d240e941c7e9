"""Does keeping dense features pay? For each dense task: encode once and load in every epoch, or encode in every epoch.

python tests/benchmarks/dense_cache.py [--device cuda --precision bf16 --images 64] [--epochs 50 --trials 20] [--tasks ...]

Measured here: seconds that the base encoder takes for an image of noise of the task's size (on a CPU, of one core: other
processes do not count), and seconds to load a sample's four levels with `SplitFeatures.load` in batches of 16, from a file
that was dropped from memory (cold) and from one that lies in memory (warm). Counted, not measured: what that makes at the
published sizes. GB of the cache; hours to encode once (four flips of train, val and test once) and to load in all epochs
of all trials, cold; hours to encode in every epoch of every trial (train and val); and the number of epochs, over all
trials, from which the cache has paid. The last columns turn it round: an encoder that does more images a second than that
is faster than loading. Heads cost the same either way and are left out; so is reading images, which the cache does once.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from copernicus.datasets import TASKS
from copernicus.datasets.bench.task import Task
from copernicus.models.zoo import create_encoder
from copernicus.platform.encoding import FLIPS, Precision, stored_features
from copernicus.platform.feature_store import Writer, finish, writing
from copernicus.platform.features import load_features

FILE_BYTES = 300e6
BATCH = 16  # of the published dense probes


@dataclass(frozen=True)
class Measured:
    """Seconds a sample (of all its dates), and bytes a sample and flip."""

    encode: float
    cold: float
    warm: float
    size: int


@dataclass(frozen=True)
class Counted:
    """Of a whole task at its published size: GB, hours, and the epochs from which the cache has paid (inf: never)."""

    gb: float
    once: float
    load: float
    again: float
    pays: float


def count(measured: Measured, splits: tuple[int, int, int], epochs: int) -> Counted:
    """What a task costs in so many epochs, of all trials together."""
    train, val, test = splits
    kept = len(FLIPS) * train + val + test
    once = kept * measured.encode
    saved = (train + val) * (measured.encode - measured.cold)
    load, again = (epochs * (train + val) * seconds / 3600 for seconds in (measured.cold, measured.encode))
    return Counted(kept * measured.size / 1e9, once / 3600, load, again, once / saved if saved > 0 else float("inf"))


def measure(task: Task, device: str, precision: Precision, images: int) -> Measured:
    encoder = create_encoder("copernicus_fm_base", task.sensor, 0).to(device).eval()
    generator = torch.Generator().manual_seed(0)
    channels = task.sensor.channels * task.dates
    x_BCHW = torch.randn(images, channels, task.input_size, task.input_size, generator=generator)
    metadata = torch.full((images, 4) if task.dates == 1 else (images, task.dates, 4), torch.nan)
    ids = [str(i) for i in range(images)]
    clock = time.process_time if device == "cpu" else time.perf_counter

    def encode(number: int) -> list[np.ndarray]:
        some = slice(0, number)
        return stored_features(
            encoder, task, x_BCHW[some], metadata[some], task.sensors(), precision, ids[some]
        )  # ends with a copy to the CPU: a GPU has then finished

    if device != "cpu":  # on which the first call is like any other
        encode(images)
    start = clock()
    levels = encode(images)
    seconds = (clock() - start) / images
    cold, warm = load_seconds([level[:1] for level in levels])
    return Measured(seconds, cold, warm, sum(level[0].nbytes for level in levels))


def load_seconds(levels_1: list[np.ndarray]) -> tuple[float, float]:
    """Seconds to load a sample of these levels: cold and warm, at random places of a file of about ``FILE_BYTES``."""
    samples = max(BATCH, int(FILE_BYTES / sum(level.nbytes for level in levels_1)) // BATCH * BATCH)
    with tempfile.TemporaryDirectory(dir=".") as folder:  # not /tmp, which may be in memory
        entry = Path(folder) / "task" / "train"
        with writing(entry) as partial:
            assert partial is not None
            batches = [
                Writer(partial, samples).write(
                    start, [np.repeat(level[None], BATCH, axis=1) for level in levels_1], np.zeros(BATCH, np.int64)
                )
                for start in range(0, samples, BATCH)
            ]
            finish(partial, batches, [str(i) for i in range(samples)])
        for path in entry.iterdir():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        split = load_features(entry)
        order = np.random.default_rng(0).permutation(samples).reshape(-1, BATCH)
        times = []
        for _ in range(2):
            start = time.perf_counter()
            for index in order:
                split.load(index, np.zeros_like(index))
            times.append((time.perf_counter() - start) / samples)
    return times[0], times[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="float32", choices=["float32", "bf16"])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=50)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--tasks", nargs="+", default=[task.name for task in TASKS.values() if task.dense])
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        torch.set_num_threads(1)
    epochs = arguments.epochs * arguments.trials
    title = f"base encoder, {arguments.device}, {arguments.precision}: {arguments.trials} trials of {arguments.epochs} epochs"
    table = Table(title=f"{title}; s and MB measured, GB and h counted at the published sizes")
    columns = (
        "task",
        "side",
        "MB a sample",
        "s to encode",
        "s to load (cold, warm)",
        "GB",
        "h once",
        "h load",
        "h again",
    )
    for column in (*columns, "pays from epoch", "pays below images/s (cold, warm)"):
        table.add_column(column, justify="left" if column == "task" else "right")
    known: dict[tuple[str, int, int], Measured] = {}
    for task in (TASKS[name] for name in arguments.tasks):
        kind = (task.sensor.name, task.input_size, task.dates)
        if kind not in known:
            known[kind] = measure(task, arguments.device, arguments.precision, arguments.images)
        one = known[kind]
        all_ = count(one, (task.splits["train"], task.splits["val"], task.splits["test"]), epochs)
        table.add_row(
            task.name,
            str(task.input_size),
            f"{one.size / 1e6:.2f}",
            f"{one.encode:.3g}",
            f"{one.cold:.2g}, {one.warm:.2g}",
            f"{all_.gb:.0f}",
            f"{all_.once:.3g}",
            f"{all_.load:.3g}",
            f"{all_.again:.4g}",
            "never" if all_.pays == float("inf") else f"{all_.pays:.1f}",
            f"{task.dates / one.cold:.0f}, {task.dates / one.warm:.0f}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
