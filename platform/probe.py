"""One probe: a small head trained on the features of a frozen encoder, chosen by validation, tested once.

Protocol of the benchmark's public code: for classification SGD with weight decay 1e-4, for dense tasks AdamW with
torch's weight decay; one-cycle cosine schedule per step without warm-up (which also moves SGD's momentum and Adam's
first beta from 0.85 to 0.95); 50 epochs; the epoch with the best validation metric is tested. Regressions minimise the
mean absolute error. Heads are ``copernicus.models.heads``; the benchmark's UPerNet head is not among them.

Metrics are computed over the whole split. The public code averages the metrics of its batches instead, which differs
for mIoU, mAP and RMSE; that figure is reported beside, as ``<metric>_batchmean``.

Shapes: B batch, D feature width, h w token grid, K outputs, H W label size.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex, MultilabelAveragePrecision

from copernicus.datasets.bench.task import Task
from copernicus.datasets.order import generator
from copernicus.datasets.sensors import InputError
from copernicus.models.heads import DenseHead, LinearHead
from copernicus.platform.features import SplitFeatures, TaskFeatures

logger = logging.getLogger(__name__)
Report = Callable[[int, dict[str, float]], None]


@dataclass(frozen=True)
class ProbeSettings:
    """How a head is trained. ``for_task`` gives the benchmark's own settings.

    Raises:
        InputError: a value that no training can have.
    """

    lr: float
    epochs: int = 50
    batch_size: int = 64
    weight_decay: float = 1e-4
    warmup_epochs: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "warmup_epochs"):  # searches hand out floats
            if getattr(self, name) == int(getattr(self, name)):
                object.__setattr__(self, name, int(getattr(self, name)))
            else:
                raise InputError(f"probe: {name} is {getattr(self, name)}; it must be a whole number")
        for name, value in dataclasses.asdict(self).items():
            zero = name in ("weight_decay", "warmup_epochs")
            if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
                raise InputError(f"probe: {name} is {value}; it must be {'at least 0' if zero else 'above 0'}")
        if self.batch_size < 2:
            raise InputError("probe: batch_size must be at least 2 (batch normalisation)")
        if self.warmup_epochs >= self.epochs:
            raise InputError(f"probe: warmup_epochs ({self.warmup_epochs}) must be below epochs ({self.epochs})")

    @classmethod
    def for_task(cls, task: Task, **overrides: Any) -> ProbeSettings:
        """The published settings of a task, with some replaced."""
        published = {**dataclasses.asdict(task.probe), "weight_decay": 1e-2 if task.dense else 1e-4}
        return cls(**{**published, **overrides})


@dataclass(frozen=True)
class ProbeResult:
    """What a probe reached. Metrics are named as ``Task.metric_key``: per cent, or the target's units (rmse).

    Attributes:
        val, test: metrics of the best epoch: ``<metric>``, ``<metric>_batchmean``, ``loss``; test is None if unasked.
        best_epoch: counted from 1.
        curves: one dictionary per epoch, as reported.
        samples: how many samples of each split were used.
    """

    metric: str
    val: dict[str, float]
    test: dict[str, float] | None
    best_epoch: int
    curves: list[dict[str, float]]
    samples: dict[str, int]


def run_probe(
    features: TaskFeatures,
    task: Task,
    settings: ProbeSettings,
    seed: int,
    report: Report | None = None,
    test: bool = True,
    device: str | torch.device = "cpu",
) -> ProbeResult:
    """Train a head, keep the epoch that is best on validation, test that one once.

    Every draw (initial weights, order, flips) depends on (seed, epoch, sample) alone; torch's and numpy's global random
    states are neither read nor written.

    Args:
        report: called after each epoch, counted from 1, with its figures; may raise to end the trial.
        test: False in a search, which has no business with the test split.

    Raises:
        InputError: fewer than two training samples, or no known target in a split.
        FloatingPointError: the loss was not finite in the first epoch. Later, training ends there with a warning.
    """
    train = features.splits["train"]
    if len(train) < 2:
        raise InputError(f"{task.name}: {len(train)} training sample; a probe needs at least 2")
    head = make_head(features, task, seed).to(device)
    if task.dense:
        optimiser: torch.optim.Optimizer = torch.optim.AdamW(
            head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
    else:
        # The schedule sets the momentum, as it does in the public code.
        optimiser = torch.optim.SGD(head.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    steps = len(list(_batches(np.arange(len(train)), settings.batch_size)))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser,
        max_lr=settings.lr,
        total_steps=settings.epochs * steps,
        pct_start=settings.warmup_epochs / settings.epochs,
        anneal_strategy="cos",
    )
    key = task.metric_key
    curves: list[dict[str, float]] = []
    best: dict[str, float] = {}
    best_epoch, best_state = 0, head.state_dict()
    for epoch in range(1, settings.epochs + 1):
        lr = float(schedule.get_last_lr()[0])
        loss = _train_epoch(head, train, task, settings, seed, epoch, optimiser, schedule, device)
        if not math.isfinite(loss):
            if not best:
                raise FloatingPointError(
                    f"{task.name}: the loss is {loss} in epoch {epoch}; lower lr ({settings.lr:g})"
                )
            logger.warning("%s: the loss is %s in epoch %d (lr %g); training ends", task.name, loss, epoch, settings.lr)
            break
        val = evaluate(head, features.splits["val"], task, settings.batch_size, device)
        curves.append({"train_loss": loss, "lr": lr, **{f"val_{name}": value for name, value in val.items()}})
        if not best or (val[key] > best[key] if task.higher_is_better else val[key] < best[key]):
            best, best_epoch = val, epoch
            best_state = {name: value.clone() for name, value in head.state_dict().items()}
        if report is not None:
            report(epoch, curves[-1])
    head.load_state_dict(best_state)
    tested = evaluate(head, features.splits["test"], task, settings.batch_size, device) if test else None
    samples = {name: len(split) for name, split in features.splits.items() if test or name != "test"}
    return ProbeResult(key, best, tested, best_epoch, curves, samples)


def make_head(features: TaskFeatures, task: Task, seed: int) -> nn.Module:
    """A linear head for pooled features, a small convolutional one for dense ones."""
    if task.dense:
        return DenseHead(features.dims, task.num_classes, seed=seed)
    return LinearHead(features.dims[0], task.num_classes, seed=seed)


def evaluate(
    head: nn.Module, split: SplitFeatures, task: Task, batch_size: int, device: str | torch.device = "cpu"
) -> dict[str, float]:
    """Loss and metric over all samples of a split, and the published mean over batches.

    Raises:
        InputError: no target of the split is known.
    """
    key = task.metric_key
    metric = make_metric(task).to(device)
    evaluated, loss_sum, loss_weight, batch_sum, batch_weight = 0, 0.0, 0, 0.0, 0
    head.eval()
    with torch.inference_mode():
        for start in range(0, len(split), batch_size):
            index = np.arange(start, min(start + batch_size, len(split)))
            levels, target = split.load(index, np.zeros_like(index), device)
            output = predict(head, levels, target, task)
            loss, known = loss_and_count(output, target, task)
            evaluated += len(index)
            if known == 0:
                continue
            value = float(metric(*_for_metric(output, target, task)))
            loss_sum, loss_weight = loss_sum + float(loss) * known, loss_weight + known
            batch_sum, batch_weight = batch_sum + value * len(index), batch_weight + len(index)
    assert evaluated == len(split.targets) == len(split.ids), (evaluated, len(split.targets), len(split.ids))
    if loss_weight == 0:
        raise InputError(f"{task.name}: no sample of the split has a known target")
    scale = task.target_std if task.kind == "regression" else 100.0
    return {
        key: float(metric.compute()) * scale,
        f"{key}_batchmean": batch_sum / batch_weight * scale,
        "loss": loss_sum / loss_weight,
    }


def make_metric(task: Task) -> Metric:
    """The benchmark's metric, to be computed over a whole split (fractions; RMSE of normalised targets)."""
    if task.metric == "OA":
        return MulticlassAccuracy(task.num_classes, average="micro", validate_args=False)
    if task.metric == "mAP":
        return MultilabelAveragePrecision(task.num_classes, average="micro", validate_args=False)
    if task.metric == "mIoU":
        return MulticlassJaccardIndex(task.num_classes, ignore_index=task.ignore_index, validate_args=False)
    return MeanSquaredError(squared=False)


def predict(head: nn.Module, levels: list[Tensor], target: Tensor, task: Task) -> Tensor:
    """(B, K) logits; dense: (B, K, H, W) logits, or (B, H, W) normalised values."""
    if not task.dense:
        return head(levels[0])
    output_BKHW = head(levels, tuple(target.shape[-2:]))
    return output_BKHW[:, 0] if task.kind == "regression" else output_BKHW


def loss_and_count(output: Tensor, target: Tensor, task: Task) -> tuple[Tensor, int]:
    """Mean loss over the known targets (0 where there are none), and their number."""
    if task.kind == "multilabel":
        return F.multilabel_soft_margin_loss(output, target.float()), len(target)
    if task.kind == "classification":
        return F.cross_entropy(output, target), len(target)
    if task.kind == "regression":
        known = ~target.isnan()
        count = int(known.sum())
        return (output - target)[known].abs().sum() / max(count, 1), count
    ignore = -100 if task.ignore_index is None else task.ignore_index
    count = int((target != ignore).sum())
    return F.cross_entropy(output, target, ignore_index=ignore, reduction="sum") / max(count, 1), count


def _for_metric(output: Tensor, target: Tensor, task: Task) -> tuple[Tensor, Tensor]:
    if task.kind == "regression":
        known = ~target.isnan()
        return output[known], target[known]
    if task.kind == "multilabel":
        return output.sigmoid(), target
    return output.max(dim=1).indices, target  # of a dense map seven times as fast as argmax on a CPU


def _train_epoch(
    head: nn.Module,
    train: SplitFeatures,
    task: Task,
    settings: ProbeSettings,
    seed: int,
    epoch: int,
    optimiser: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    device: str | torch.device,
) -> float:
    """One pass over the training split in an order of its own; the mean loss per sample."""
    # The n-th flip belongs to sample n, not to the n-th place in the order.
    flips_N = generator("probe flips", seed, epoch).integers(train.flips, size=len(train))
    order = generator("probe order", seed, epoch).permutation(len(train))
    total = 0.0
    head.train()
    for index in _batches(order, settings.batch_size):
        levels, target = train.load(index, flips_N[index], device)
        loss, _ = loss_and_count(predict(head, levels, target, task), target, task)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        total += loss.item() * len(index)
    return total / len(train)


def _batches(order: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Consecutive batches; a last batch of one joins the one before: batch normalisation needs two."""
    starts = list(range(0, len(order), batch_size))
    if len(order) - starts[-1] == 1 and len(starts) > 1:
        starts.pop()
    for number, start in enumerate(starts):
        yield order[start : starts[number + 1] if number + 1 < len(starts) else len(order)]
