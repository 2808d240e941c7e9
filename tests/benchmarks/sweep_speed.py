"""A sweep of linear probes on EuroSAT-S2 at its real size: the published way beside this platform's.

python tests/benchmarks/sweep_speed.py                 20 trials x 3 seeds x 50 epochs; 27,000 images of noise (3 GB on disk),
                                                       half an hour on two cores
python tests/benchmarks/sweep_speed.py --share 0.02    a fiftieth of the images, to see it run

The published way (github.com/zhu-xlab/Copernicus-FM, Copernicus-Bench: one run a setting) reads and encodes every training
and validation image in every epoch of every trial. Here the four flips are encoded once, and trials train on features.

Measured: an epoch's passes of the published way over some images, base encoder at 224 pixels; the whole sweep of ours, on
Ray Tune with MLflow in SQLite, with an encoder of the same width that costs next to nothing. Extrapolated, and marked ~:
the published way by its passes; ours by adding its passes of the base encoder, which this counts at the same speed. That
both ways come to the same metric is shown on some images, trained both ways with the same draws.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from copernicus.datasets.bench import get_task
from copernicus.datasets.order import generator
from copernicus.models import create_encoder
from copernicus.platform.cell import Cell
from copernicus.platform.encoding import FLIPS
from copernicus.platform.features import TaskFeatures, encode_task
from copernicus.platform.journal import FINAL, SEARCH, Trial
from copernicus.platform.live_split import LiveSplit
from copernicus.platform.probe import ProbeSettings, run_probe
from copernicus.platform.schema import Encoder, Experiment, Model, Space, Sweep
from copernicus.platform.session import ray_session
from copernicus.platform.spool import Spool
from copernicus.platform.sweep import cells, sweep
from copernicus.platform.sweep_stage import record
from copernicus.platform.tracking import Tracker

HERE = Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE / "sweeping"), os.environ.get("PYTHONPATH", "")])  # Ray's workers'
sys.path[:0] = [str(HERE / "sweeping"), str(HERE.parent)]
from bench_files import write_tif  # noqa: E402

TASK = get_task("eurosat_s2")
TRIALS, SEEDS, EPOCHS = 20, 3, 50
RUNS = TRIALS + SEEDS


def write_images(root: Path, share: float) -> dict[str, int]:
    """EuroSAT's splits at their real sizes, or a share of them: noise, each class brighter in one band."""
    counts = {split: max(20, round(share * n)) for split, n in TASK.splits.items()}
    for split, count in counts.items():
        names = []
        for i in range(count):
            rng = generator("noise", split, i)
            label = i % TASK.num_classes
            values = rng.integers(500, 3500, (13, 64, 64), dtype=np.uint16)
            values[label] += np.uint16(150)
            names.append(f"{TASK.classes[label]}_{split}{i}")
            write_tif(root / f"all_imgs/{TASK.classes[label]}/{names[-1]}.tif", values, 32633, 5e5, 5.3e6, 10)
        (root / f"eurosat-{split}.txt").write_text("".join(f"{name}.jpg\n" for name in names))
    return counts


def subset(root: Path, out: Path, counts: dict[str, int]) -> Path:
    """The first images of each split, by reference."""
    out.mkdir(parents=True)
    (out / "all_imgs").symlink_to(root / "all_imgs")
    for split, count in counts.items():
        lines = (root / f"eurosat-{split}.txt").read_text().splitlines()[:count]
        (out / f"eurosat-{split}.txt").write_text("".join(f"{line}\n" for line in lines))
    return out


def published_epoch(root: Path, encoder: torch.nn.Module) -> tuple[float, float]:
    """Seconds per pass of the base encoder in the published way's epoch, reading included; and of reading alone."""
    dataset = TASK.open(root, "train")
    live = LiveSplit(encoder, dataset, len(FLIPS))
    index = np.arange(len(dataset))
    started = time.perf_counter()
    for i in index:
        dataset[int(i)]
    reading = (time.perf_counter() - started) / len(index)
    live.load(index[:8], np.zeros(8, np.int64))  # warm
    started = time.perf_counter()
    for batch in np.split(index, len(index) // 16):
        live.load(batch, np.zeros(len(batch), np.int64))
    return (time.perf_counter() - started) / len(index), reading


def same_metric(root: Path, encoder: torch.nn.Module, cache: Path) -> tuple[dict, dict]:
    """The same probe trained from the cache and by encoding whenever a sample is asked for."""
    cached = encode_task(encoder, TASK, root, cache)
    live = {
        split: LiveSplit(encoder, TASK.open(root, split), len(FLIPS) if split == "train" else 1)
        for split in ("train", "val", "test")
    }
    settings = ProbeSettings.for_task(TASK, epochs=3, batch_size=16)
    a = run_probe(cached, TASK, settings, seed=1)
    b = run_probe(TaskFeatures(TASK.name, live), TASK, settings, seed=1)
    assert a.test is not None
    assert b.test is not None
    return a.val | {f"test {k}": v for k, v in a.test.items()}, b.val | {f"test {k}": v for k, v in b.test.items()}


def our_sweep(root: Path, work: Path, name: str, trials: int, concurrent: int) -> dict[str, float]:
    """Seconds of the parts of a sweep with the stand-in: everything but the base encoder."""
    encoders = {"stand_in": Encoder(model=Model("stand_in:StandIn"))}
    settings = Sweep(
        data=str(root), tasks=[TASK.name], encoders=encoders, search={"lr": Space(low=1e-3, high=1.0)}, trials=trials,
        seeds=SEEDS, epochs=EPOCHS, cache=str(work / "cache"), max_concurrent=concurrent,
    )  # fmt: skip
    experiment = Experiment(name=name, kind="sweep", sweep=settings)
    tracker = Tracker(f"sqlite:///{work}/mlflow.db", "speed", work / "artifacts")
    run = tracker.start(name, {})
    marks: dict[str, float] = {}
    logging: list[float] = []
    spent = {SEARCH: 0.0, FINAL: 0.0}
    started = time.perf_counter()

    def on_stage(cell: Cell, stage: str) -> None:
        marks.setdefault(stage.split()[0], time.perf_counter() - started)

    with Spool(tracker, work / name / "mlflow") as spool:

        def on_trial(cell: Cell, trial: Trial) -> None:
            before = time.perf_counter()
            record(spool, run, experiment, cell, trial, None, "")
            logging.append(time.perf_counter() - before)
            spent[trial.role] += trial.metrics["seconds"]
            marks.setdefault(f"first {trial.role}", time.perf_counter() - started)
            marks[f"last {trial.role}"] = time.perf_counter() - started

        sweep(settings, cells(settings, None, None), 0, work / name, on_trial, on_stage)
    whole = time.perf_counter() - started
    return {
        "whole": whole,
        "encoding": marks["search"] - marks["encoding"],
        "search": marks["seeds"] - marks["search"],
        "trial": spent[SEARCH] / trials,
        "steady": (marks[f"last {SEARCH}"] - marks[f"first {SEARCH}"]) / max(1, trials - 1),
        "start": marks[f"first {SEARCH}"] - marks["search"],
        "log": 1000 * sum(logging) / len(logging),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the images")
    parser.add_argument("--probe", type=int, default=48, help="images to time the base encoder on")
    parser.add_argument("--rates", action="store_true", help="also other numbers of trials and of trials at once")
    options = parser.parse_args()
    console = Console(width=150)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        work = Path(folder)
        root = work / "eurosat_s2"
        counts = write_images(root, options.share)
        console.print(f"images: {counts}")
        encoder = create_encoder("copernicus_fm_base", TASK.sensor, 0).eval().requires_grad_(False)
        few = subset(
            root, work / "few", {"train": options.probe, "val": options.probe // 2, "test": options.probe // 2}
        )
        per_pass, reading = published_epoch(few, encoder)
        cached, live = same_metric(few, encoder, work / "few_cache")
        with ray_session():
            ours = our_sweep(root, work, "one", TRIALS, 1)
            rates = {(TRIALS, 1): ours}
            for trials, concurrent in ((TRIALS // 2, 1), (TRIALS // 2, 2), (TRIALS, 2)) if options.rates else ():
                rates[trials, concurrent] = our_sweep(root, work, f"n{trials}c{concurrent}", trials, concurrent)

    train, rest = counts["train"], counts["val"] + counts["test"]
    passes = RUNS * EPOCHS * (train + counts["val"]) + SEEDS * counts["test"]
    our_passes = len(FLIPS) * train + rest
    published_s, encoder_s = passes * per_pass, our_passes * (per_pass - reading)
    ours_s = ours["whole"] + encoder_s
    table = Table(
        title=f"EuroSAT-S2, base encoder at 224 px, {TRIALS} trials + {SEEDS} seeds of the best, {EPOCHS} epochs"
    )
    for column in ("", "published way", "ours", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    table.add_row("encoder passes", f"{passes:,}", f"{our_passes:,}", f"{passes / our_passes:.0f} x fewer")
    table.add_row("seconds per pass, reading included", f"{per_pass:.3f}", f"{per_pass:.3f}", "")
    table.add_row("encoding, s", f"~ {published_s:,.0f}", f"~ {encoder_s:,.0f}", f"{published_s / encoder_s:.0f} x")
    table.add_row("reading, storing, heads, Tune, MLflow, s", "not counted", f"{ours['whole']:.0f}", "")
    table.add_row(
        "the whole sweep", f"~ {published_s / 86400:.1f} days", f"~ {ours_s / 3600:.2f} hours",
        f"{published_s / ours_s:.0f} x less time",
    )  # fmt: skip
    everywhere = TRIALS * SEEDS * (EPOCHS * (train + counts["val"]) + counts["test"])
    table.add_row(
        f"were every trial run with {SEEDS} seeds: passes", f"{everywhere:,}", f"{our_passes:,}",
        f"{everywhere / our_passes:.0f} x fewer",
    )  # fmt: skip
    console.print(table)

    table = Table(title=f"The same draws both ways: base encoder, {options.probe} training images, 3 epochs")
    for column in ("", "encoded anew", "from the cache", "difference"):
        table.add_column(column, justify="right" if column else "left")
    for name, value in cached.items():
        table.add_row(name, f"{live[name]:.4f}", f"{value:.4f}", f"{abs(value - live[name]):.1e}")
    console.print(table)

    table = Table(title=f"Probes from the cache: {train:,} images x 768, {EPOCHS} epochs a trial")
    for column in ("trials", "at once", "trials a minute", "s per trial, alone in its process", "s from trial to trial",
                   "overhead per trial (Ray Tune), s", "first trial after, s", "MLflow, ms per trial"):  # fmt: skip
        table.add_column(column, justify="right")
    for (trials, concurrent), found in sorted(rates.items()):
        overhead = found["steady"] - found["trial"] / concurrent
        table.add_row(
            str(trials), str(concurrent), f"{60 / found['steady']:.0f}", f"{found['trial']:.2f}", f"{found['steady']:.2f}",
            f"{overhead:.2f}", f"{found['start']:.1f}", f"{found['log']:.1f}",
        )  # fmt: skip
    console.print(table)


if __name__ == "__main__":
    main()
