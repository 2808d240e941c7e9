"""An encoder that costs next to nothing and is as wide as the base model: what a sweep costs beside its encoder."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from copernicus.datasets.order import generator


class StandIn(nn.Module):
    """Means of 8 x 8 fields of each band, projected at random to 768."""

    inputs = "any image"
    width = 768

    def __init__(self, sensor, seed: int = 0) -> None:
        super().__init__()
        drawn = generator("stand-in", seed).standard_normal((sensor.channels * 64, self.width), np.float32)
        self.kernel = nn.Parameter(torch.from_numpy(drawn) / drawn.shape[0] ** 0.5)

    @staticmethod
    def takes(sensor) -> bool:
        return True

    def encode(self, x_BCHW: Tensor, sensor, metadata=None, normalize: bool = True) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x_BCHW, 8).flatten(1) @ self.kernel

    def encode_dense(self, x_BCHW: Tensor, sensor, metadata=None, normalize: bool = True) -> list[Tensor]:
        return [self.encode(x_BCHW, sensor)[:, :, None, None]]
