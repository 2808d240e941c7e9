"""The platform's side: `pretrain` on Ray Train and Ray Data, with its own worker, step by step as a run's figures tell."""

from __future__ import annotations

import functools
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from reading.measure import Usage, usage
from training.work import SEED, Result, Work

from copernicus.platform import pretrain as module
from copernicus.platform.session import ray_session


def run(work: Work) -> Result:
    """Times come from ``train/samples_per_s``: samples since the start of the stream over the time since then."""
    ended: list[float] = []
    losses: list[float] = []
    seen: list[tuple[int, Usage]] = []

    def on_metrics(step: int, metrics: dict[str, float]) -> None:
        if not step:
            return
        assert step == len(ended) + 1, f"step {step} after {len(ended)}"
        ended.append(step * work.batch_size / metrics["train/samples_per_s"])
        losses.append(metrics["train/loss"])

    def on_progress(step: int, steps: int, metrics: dict[str, float]) -> None:
        if step >= work.skip:
            seen.append((step, usage(os.getpid())))

    module.train_worker = functools.partial(with_threads, module.train_worker, work.threads)
    with ray_session(), tempfile.TemporaryDirectory() as folder:
        module.pretrain(work.settings, SEED, Path(folder) / "run", on_metrics, on_progress)
    (first, before), (last, after) = seen[0], seen[-1]
    seconds = [end - start for start, end in zip(ended[work.skip - 1 :], ended[work.skip :], strict=False)]
    return Result(seconds, after.since(before).cpu_s / (last - first), losses)


def with_threads(train_worker: Any, threads: int, config: dict[str, Any]) -> None:
    """A worker takes its share of the machine's threads; here it gets as many as it is told."""
    torch.set_num_threads(threads)
    torch.set_num_threads = lambda number: None
    train_worker(config)
