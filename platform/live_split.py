"""A split whose features are not kept: the asked-for samples are read and encoded on the spot.

It answers as a cached split does, so that a probe is the same on either. Numbers agree up to rounding in the encoder: the
samples of a batch are others than when the cache was made, and matrix products of other sizes may sum in another order.

Shapes: F flips, N samples, B batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from copernicus.datasets.bench.reader import TaskDataset
from copernicus.platform.encoding import (
    FLIPS,
    Precision,
    collate,
    device_of,
    flipped_targets,
    stored_features,
    stored_targets,
)


@dataclass(frozen=True)
class LiveSplit:
    """A split that is encoded when it is asked for.

    Args:
        encoder: frozen; used in evaluation mode, and moved to where features are asked for.
        flips: copies of each sample, the first ones of ``FLIPS``.
    """

    encoder: Any
    dataset: TaskDataset
    flips: int
    precision: Precision = "float32"

    def __len__(self) -> int:
        return len(self.dataset)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        return tuple(self.dataset.ids)

    @cached_property
    def targets(self) -> np.ndarray:
        """(N,), (N, K) or (N, H, W); all samples are read for it, once."""
        task = self.dataset.task
        return np.concatenate([stored_targets(task, [self.dataset[i]]) for i in range(len(self))])

    @cached_property
    def dims(self) -> tuple[int, ...]:
        levels, _ = self.load(np.array([0]), np.array([0]), device_of(self.encoder))
        return tuple(level.shape[1] for level in levels)

    def load(
        self, index: np.ndarray, flips: np.ndarray, device: str | torch.device = "cpu"
    ) -> tuple[list[Tensor], Tensor]:
        """Some samples, each in the flip of that number: as `SplitFeatures.load`.

        Raises:
            InputError: a sample cannot be read.
            ValueError: features are not finite.
        """
        task = self.dataset.task
        samples = [self.dataset[int(i)] for i in index]
        turned = [
            {**sample, "image": sample["image"].flip(FLIPS[int(flip)])}
            for sample, flip in zip(samples, flips, strict=True)
        ]
        self.encoder.to(device)
        sensors = task.sensors(self.dataset.preset)
        ids = [sample["id"] for sample in samples]
        # Dense features pass through float16, as those of a cache do.
        stored = stored_features(self.encoder, task, *collate(turned), sensors, self.precision, ids)
        levels = [torch.from_numpy(level).to(device).float() for level in stored]
        return levels, flipped_targets(stored_targets(task, samples), flips).to(device)
