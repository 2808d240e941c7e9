"""One probe: a head trained on the features of a frozen encoder, chosen by validation, tested once.

``training.py`` is the loop, and says which protocol it follows; heads are ``copernicus.models.heads`` and, for dense
tasks, the benchmark's ``copernicus.models.upernet``. Metrics are computed over the whole split. The public code averages
the metrics of its batches instead, which differs for mIoU, mAP and RMSE; that figure is reported beside, as
``<metric>_batchmean``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from copernicus.datasets.bench.task import Task
from copernicus.datasets.sensors import InputError
from copernicus.models.heads import DenseHead, LinearHead
from copernicus.models.upernet import UPerNet
from copernicus.platform.features import TaskFeatures
from copernicus.platform.training import Report, Split, measure, predict_split, train

HEADS = ("upernet", "light")


@dataclass(frozen=True)
class ProbeSettings:
    """How a head is trained. ``for_task`` gives the benchmark's own settings.

    Attributes:
        head: for dense tasks: ``upernet``, as published, which wants a GPU (on a base encoder's features a step of 16
            images takes a CPU core about a minute); or ``light``, a few convolutions on the token grid, for laptops.
        channels: width of the UPerNet; 512 as published.

    Raises:
        InputError: a value that no training can have.
    """

    lr: float
    epochs: int = 50
    batch_size: int = 64
    weight_decay: float = 1e-4
    warmup_epochs: int = 0
    head: str = "upernet"
    channels: int = 512

    whole: ClassVar[tuple[str, ...]] = ("epochs", "batch_size", "warmup_epochs", "channels")
    may_be_zero: ClassVar[tuple[str, ...]] = ("weight_decay", "warmup_epochs")

    def __post_init__(self) -> None:
        for name in self.whole:  # searches hand out floats
            value = getattr(self, name)
            if value is None:
                continue
            if not math.isfinite(value) or value != int(value):
                raise InputError(f"probe: {name} is {value}; it must be a whole number")
            object.__setattr__(self, name, int(value))
        for name, value in dataclasses.asdict(self).items():
            if value is None or isinstance(value, str):
                continue
            zero = name in self.may_be_zero
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
                raise InputError(f"probe: {name} is {value}; it must be {'at least 0' if zero else 'above 0'}")
        if self.batch_size < 2:
            raise InputError("probe: batch_size must be at least 2 (batch normalisation)")
        if self.channels < 2:
            raise InputError("probe: channels must be at least 2 (the auxiliary head has half of them)")
        if self.head not in HEADS:
            raise InputError(f"probe: no head {self.head!r}; the heads are {', '.join(HEADS)}")
        if self.warmup_epochs >= self.epochs:
            raise InputError(f"probe: warmup_epochs ({self.warmup_epochs}) must be below epochs ({self.epochs})")

    @classmethod
    def for_task(cls, task: Task, **overrides: Any) -> Any:
        """The published settings of a task, with some replaced."""
        published = {**dataclasses.asdict(task.probe), "weight_decay": published_weight_decay(task)}
        return cls(**{**published, **overrides})


def published_weight_decay(task: Task) -> float:
    """The public code gives SGD its own and leaves AdamW torch's."""
    return 1e-2 if task.dense else 1e-4


@dataclass(frozen=True)
class Examples:
    """A few samples of the test split for pictures; see ``predict_split``."""

    ids: tuple[str, ...]
    predicted: np.ndarray
    target: np.ndarray


@dataclass(frozen=True)
class ProbeResult:
    """What a trial reached. Metrics are per cent, or in the target's units (rmse, mae); ``metrics.py`` names them.

    Attributes:
        metric: the benchmark's metric of the task, ``Task.metric_key``.
        val, test: figures of the best epoch: the metrics, ``<metric>_batchmean``, ``loss``; test is None if unasked.
        best_epoch: counted from 1; of a quick look, the number of the best candidate.
        curves: one dictionary per epoch (candidate), as reported.
        samples: how many samples of each split were used.
        chosen: what a quick look chose on validation.
        confusion: (K, K) int64, targets by predictions, of the test split (of validation, if test was unasked); None
            where a task has no classes to confuse.
        examples: the first test samples, if asked for.
    """

    metric: str
    val: dict[str, float]
    test: dict[str, float] | None
    best_epoch: int
    curves: list[dict[str, float]]
    samples: dict[str, int]
    chosen: dict[str, float] = field(default_factory=dict)
    confusion: np.ndarray | None = field(default=None, compare=False, repr=False)
    examples: Examples | None = field(default=None, compare=False, repr=False)


def run_probe(
    features: TaskFeatures,
    task: Task,
    settings: ProbeSettings,
    seed: int,
    report: Report | None = None,
    test: bool = True,
    device: str | torch.device = "cpu",
    examples: int = 0,
) -> ProbeResult:
    """Train a head, keep the epoch that is best on validation, test that one once.

    Args:
        report: called after each epoch, counted from 1, with its figures; may raise to end the trial.
        test: False in a search, which has no business with the test split.
        examples: how many test samples to keep predictions of.

    Raises:
        InputError: fewer than two training samples, or no known target in a split.
        FloatingPointError: the loss was not finite in the first epoch. Later, training ends there with a warning.
    """
    head = make_head(features.dims, task, settings, seed).to(device)
    return run_training(head, features.splits, task, settings, seed, report, test, device, examples)


def run_training(
    model: nn.Module,
    splits: Mapping[str, Split],
    task: Task,
    settings: ProbeSettings,
    seed: int,
    report: Report | None = None,
    test: bool = True,
    device: str | torch.device = "cpu",
    examples: int = 0,
    **options: Any,
) -> ProbeResult:
    """Train a model (``training.train``, which takes further options), and evaluate its best epoch."""
    course = train(model, splits["train"], splits["val"], task, settings, seed, report, device, **options)
    figures, evaluation, shown = {}, None, None
    for name in ("val", "test") if test else ("val",):
        evaluation = measure(model, splits[name], task, settings.batch_size, device)
        figures[name] = evaluation.compute(len(splits[name]))
    assert evaluation is not None
    if test and examples:
        index = np.arange(min(examples, len(splits["test"])))
        shown = Examples(
            tuple(splits["test"].ids[i] for i in index), *predict_split(model, splits["test"], task, index, device)
        )
    samples = {name: len(split) for name, split in splits.items() if test or name != "test"}
    return ProbeResult(
        task.metric_key,
        figures["val"],
        figures.get("test"),
        course.best_epoch,
        course.curves,
        samples,
        confusion=evaluation.confusion_KK,
        examples=shown,
    )


def make_head(dims: Sequence[int], task: Task, settings: ProbeSettings, seed: int) -> nn.Module:
    """A linear head for pooled features; for dense ones, of the widths ``dims``, the one that the settings name."""
    if not task.dense:
        return LinearHead(dims[0], task.num_classes, seed=seed)
    if settings.head == "light":
        return DenseHead(dims, task.num_classes, seed=seed)
    return UPerNet(dims, task.num_classes, settings.channels, seed=seed)
