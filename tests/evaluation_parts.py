"""Outputs to be evaluated, and one part of them evaluated: what the workers of ``test_metrics.py`` run."""

import dataclasses

import numpy as np
import torch

from copernicus.datasets import TASKS
from copernicus.platform.features import SplitFeatures
from copernicus.platform.metrics import Evaluation
from copernicus.platform.training import measure

EUROSAT, CLOUD, NO2 = TASKS["eurosat_s2"], TASKS["cloud_s3"], TASKS["aq_no2_s5p"]
LABELS = dataclasses.replace(EUROSAT, name="labels", kind="multilabel", metric="mAP", classes=tuple("abcdef"))


class Same(torch.nn.Module):
    """A head whose output is its input."""

    def forward(self, levels, size=None):
        return levels[0]


def split_of(task, samples: int, seed: int = 0) -> SplitFeatures:
    """Outputs that are right more often than not, with ties, ignored pixels and unknown targets."""
    rng = np.random.default_rng(seed)
    if task.kind == "classification":
        target = rng.integers(7, size=samples)  # three of the ten classes never occur
        outputs = np.round(rng.normal(size=(samples, 10)) + 2 * np.eye(10)[target], 1)
    elif task.kind == "multilabel":
        target = (rng.random((samples, 6)) < 0.3).astype(np.int64)
        target[:, 5] = 0  # a label that never occurs
        outputs = np.round(rng.normal(size=(samples, 6)) + target, 1)
    elif task.kind == "regression":
        target = rng.normal(size=(samples, 9, 7)).astype(np.float32)
        outputs = (target + rng.normal(size=target.shape))[:, None]
        target[rng.random(target.shape) < 0.3] = np.nan
    else:
        target = rng.choice([0, 1, 3, 255], p=[0.6, 0.2, 0.1, 0.1], size=(samples, 9, 7)).astype(np.int16)
        outputs = rng.normal(size=(samples, 5, 9, 7))
        outputs[:, 2:] -= 9 * (rng.random() < 2)  # classes 2, 3, 4 are not predicted
    return SplitFeatures((outputs[None].astype(np.float32),), target, tuple(map(str, range(samples))))


def evaluate_part(name: str, which: int, parts: int) -> Evaluation:
    task = {task.name: task for task in (EUROSAT, CLOUD, LABELS, NO2)}[name]
    return measure(Same(), split_of(task, 50), task, 8, part=(which, parts))
