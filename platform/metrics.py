"""Metrics over a whole split, kept as statistics that merge.

Each class counts or collects what its metrics need: ``update`` takes a batch, ``merge`` another worker's statistics,
``compute`` gives the figures. Counts are integers, scores are sorted before they are summed, and sums of floats are
exactly rounded (``math.fsum``), so the figures do not depend on how samples were shared out or in which order they came.

Figures are per cent, but for those of regressions, which are in the target's units:

- classification: ``oa`` (overall accuracy; equal to micro-averaged F1), ``aa`` (mean recall of the classes that occur
  among the targets), ``f1_macro``;
- segmentation and change detection: ``miou``, and the three above, over all pixels that are not ignored;
- multilabel: ``map`` (micro-averaged average precision: all labels as one ranking), ``map_macro`` (mean over the labels
  that occur; torchmetrics and scikit-learn count the others as 0), ``f1_micro`` and ``f1_macro`` (scores above 0.5);
- regression: ``rmse`` and ``mae`` over all pixels whose target is known.

A class that neither occurs nor is predicted has no IoU and no F1 and is left out of the mean; one that is predicted but
does not occur counts with 0. That is what the benchmark's public code computes (``util/misc.py``: torchmetrics'
``jaccard_index`` and ``accuracy``, of which version 1 leaves such classes out). For labels of a multilabel task F1 is 0
in that case, as in torchmetrics and scikit-learn.

Shapes: B batch, N samples, K classes or labels, H W label size, P pixels of a sample.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from copernicus.datasets.bench.task import Task
from copernicus.datasets.sensors import InputError


class Metrics(Protocol):
    """Statistics of some samples."""

    @property
    def known(self) -> int:
        """How many targets (samples, labels or pixels) entered."""
        ...

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Add a batch."""
        ...

    def merge(self, other: Metrics) -> None:
        """Add what another process has counted on other samples of the same task."""
        ...

    def value(self) -> float:
        """The benchmark's metric; NaN where nothing was known."""
        ...

    def compute(self) -> dict[str, float]:
        """All figures, the benchmark's metric among them."""
        ...


def make_metrics(task: Task) -> Metrics:
    """Empty statistics of a task's metrics."""
    if task.kind == "regression":
        return RegressionMetrics(task.target_std)
    if task.kind == "multilabel":
        return MultilabelMetrics(task.num_classes)
    return ClassMetrics(task.num_classes, task.ignore_index, dense=task.dense)


class ClassMetrics:
    """One class per sample or pixel.

    Attributes:
        confusion_KK: how often class i (row, the target) was called j (column), int64.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = None, dense: bool = False) -> None:
        self.ignore_index, self.dense = ignore_index, dense
        self.confusion_KK = np.zeros((num_classes, num_classes), np.int64)

    @property
    def known(self) -> int:
        return int(self.confusion_KK.sum())

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Args:
        scores: (B, K) or (B, K, H, W); the highest is the prediction, the first of several.
        target: (B,) or (B, H, W) class ids.
        """
        classes = len(self.confusion_KK)
        predicted = scores.max(dim=1).indices  # of a dense map seven times as fast as argmax on a CPU
        if self.ignore_index is not None:
            known = target != self.ignore_index
            predicted, target = predicted[known], target[known]
        pairs = (target * classes + predicted).flatten()
        counts = torch.bincount(pairs, minlength=classes**2).cpu().numpy()
        assert len(counts) == classes**2, f"class ids up to {len(counts) // classes} in a task of {classes} classes"
        self.confusion_KK += counts.reshape(classes, classes)

    def merge(self, other: Metrics) -> None:
        assert isinstance(other, ClassMetrics)
        self.confusion_KK += other.confusion_KK

    def value(self) -> float:
        hits_K = np.diag(self.confusion_KK)
        if not self.dense:
            return 100 * _ratio(hits_K.sum(), self.known)
        return 100 * _mean_ratio(hits_K, self.confusion_KK.sum(1) + self.confusion_KK.sum(0) - hits_K)

    def compute(self) -> dict[str, float]:
        hits_K = np.diag(self.confusion_KK)
        targets_K, predictions_K = self.confusion_KK.sum(1), self.confusion_KK.sum(0)
        figures = {
            "oa": 100 * _ratio(hits_K.sum(), self.known),
            "aa": 100 * _mean_ratio(hits_K, targets_K),
            "f1_macro": 100 * _mean_ratio(2 * hits_K, targets_K + predictions_K),
        }
        return figures | ({"miou": self.value()} if self.dense else {})


class MultilabelMetrics:
    """Any number of labels per sample."""

    def __init__(self, num_labels: int) -> None:
        self.num_labels = num_labels
        self._scores: list[np.ndarray] = []
        self._targets: list[np.ndarray] = []

    @property
    def known(self) -> int:
        return sum(target.size for target in self._targets)

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Args:
        scores: (B, K), between 0 and 1; above 0.5 a label counts as predicted.
        target: (B, K), 0 or 1.
        """
        self._scores.append(scores.float().cpu().numpy())
        self._targets.append(target.cpu().numpy().astype(bool))

    def merge(self, other: Metrics) -> None:
        assert isinstance(other, MultilabelMetrics)
        self._scores += other._scores
        self._targets += other._targets

    def value(self) -> float:
        if not self._scores:
            return math.nan
        scores_NK, targets_NK = np.concatenate(self._scores), np.concatenate(self._targets)
        return 100 * average_precision(scores_NK.ravel(), targets_NK.ravel())

    def compute(self) -> dict[str, float]:
        if not self._scores:
            return dict.fromkeys(("map", "map_macro", "f1_micro", "f1_macro"), math.nan)
        scores_NK, targets_NK = np.concatenate(self._scores), np.concatenate(self._targets)
        each = [average_precision(scores_NK[:, k], targets_NK[:, k]) for k in range(self.num_labels)]
        occurring = [value for value in each if not math.isnan(value)]
        predicted_NK = scores_NK > 0.5
        hits_K = (predicted_NK & targets_NK).sum(0)
        total_K = predicted_NK.sum(0) + targets_NK.sum(0)
        return {
            "map": self.value(),
            "map_macro": 100 * _ratio(math.fsum(occurring), len(occurring)),
            "f1_micro": 100 * _ratio(2 * hits_K.sum(), total_K.sum()),
            "f1_macro": 100 * float(np.mean(2 * hits_K / np.maximum(total_K, 1))),
        }


class RegressionMetrics:
    """One value per pixel, NaN where the target is unknown. Sums are kept for each sample: see the top of the file."""

    def __init__(self, unit: float = 1.0) -> None:
        """Args:
        unit: what 1 of the normalised target is in the target's units.
        """
        self.unit = unit
        self.known = 0
        self._squares: list[float] = []
        self._absolutes: list[float] = []

    def update(self, scores: Tensor, target: Tensor) -> None:
        """Args:
        scores: (B, H, W), normalised as the target is.
        target: (B, H, W), NaN where unknown.
        """
        error_BP = (scores - target).flatten(1).cpu().numpy().astype(np.float64)
        unknown_BP = target.flatten(1).isnan().cpu().numpy()
        error_BP = np.where(unknown_BP, 0.0, error_BP)
        self.known += int((~unknown_BP).sum())
        self._squares += np.square(error_BP).sum(1).tolist()
        self._absolutes += np.abs(error_BP).sum(1).tolist()

    def merge(self, other: Metrics) -> None:
        assert isinstance(other, RegressionMetrics)
        self.known += other.known
        self._squares += other._squares
        self._absolutes += other._absolutes

    def value(self) -> float:
        return self.unit * _ratio(math.fsum(self._squares), self.known) ** 0.5

    def compute(self) -> dict[str, float]:
        return {
            "rmse": self.value(),
            "mae": self.unit * _ratio(math.fsum(self._absolutes), self.known),
        }


class Evaluation:
    """A model's figures on a part of a split, to be merged with those of the other parts.

    Attributes:
        evaluated: samples that entered.
        metrics: their statistics.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.metrics = make_metrics(task)
        self.evaluated = 0
        self._losses: list[float] = []
        self._loss_weight = 0
        self._batches: list[float] = []
        self._batch_weight = 0

    def update(self, scores: Tensor, target: Tensor, loss: tuple[float, int] | None = None) -> None:
        """Add a batch.

        Args:
            loss: its mean over known targets, and their number.
        """
        batch = make_metrics(self.task)
        batch.update(scores, target)
        value = batch.value()
        self.metrics.merge(batch)
        self.evaluated += len(target)
        # The public code weighs batches by their samples. One without a known target has no figure.
        if not math.isnan(value):
            self._batches.append(value * len(target))
            self._batch_weight += len(target)
        if loss is not None and loss[1]:
            self._losses.append(loss[0] * loss[1])
            self._loss_weight += loss[1]

    def merge(self, other: Evaluation) -> None:
        """Add another part. Parts of whole batches give exactly what one pass over all of them gives."""
        self.metrics.merge(other.metrics)
        self.evaluated += other.evaluated
        self._losses += other._losses
        self._loss_weight += other._loss_weight
        self._batches += other._batches
        self._batch_weight += other._batch_weight

    def main(self, samples: int) -> dict[str, float]:
        """The benchmark's metric, ``<metric>_batchmean`` (the mean of the batches', as published) and, if given, ``loss``.

        Args:
            samples: how many the split has. That as many were evaluated is asserted.

        Raises:
            InputError: no target is known.
        """
        assert self.evaluated == samples, f"{self.evaluated} samples evaluated of a split of {samples}"
        if not self.metrics.known:
            raise InputError(f"{self.task.name}: no sample of the split has a known target")
        key = self.task.metric_key
        figures = {key: self.metrics.value()}
        figures[f"{key}_batchmean"] = _ratio(math.fsum(self._batches), self._batch_weight)
        if self._loss_weight:
            figures["loss"] = math.fsum(self._losses) / self._loss_weight
        return figures

    def compute(self, samples: int) -> dict[str, float]:
        """``main``, and the secondary metrics beside."""
        return self.main(samples) | self.metrics.compute()

    @property
    def confusion_KK(self) -> np.ndarray | None:
        """Targets (rows) by predictions (columns), int64; None where a task has no classes to confuse."""
        return self.metrics.confusion_KK if isinstance(self.metrics, ClassMetrics) else None


def average_precision(scores_N: np.ndarray, relevant_N: np.ndarray) -> float:
    """Mean of the precision at each threshold, weighted by the gain in recall; NaN without a relevant entry.

    Equal scores share a threshold. Not interpolated, as in scikit-learn and torchmetrics.
    """
    relevant = int(relevant_N.sum())
    if not relevant:
        return math.nan
    order = np.argsort(-scores_N)
    sorted_N = scores_N[order]
    last = np.append(np.flatnonzero(sorted_N[1:] != sorted_N[:-1]), len(sorted_N) - 1)
    hits = np.cumsum(relevant_N[order])[last]
    return float(np.sum(hits / (last + 1) * np.diff(hits, prepend=0)) / relevant)


def class_iou(confusion_KK: np.ndarray) -> np.ndarray:
    """Intersection over union of each class (K,), a fraction; NaN for one that neither occurs nor is predicted."""
    hits_K = np.diag(confusion_KK)
    union_K = confusion_KK.sum(0) + confusion_KK.sum(1) - hits_K
    return np.where(union_K > 0, hits_K / np.maximum(union_K, 1), np.nan)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else math.nan


def _mean_ratio(part_K: np.ndarray, whole_K: np.ndarray) -> float:
    """Mean of the ratios that exist."""
    there = whole_K > 0
    return float(np.mean(part_K[there] / whole_K[there])) if there.any() else math.nan
