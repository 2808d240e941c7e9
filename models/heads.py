"""Heads for probes on frozen features.

Shapes: B batch, D feature width, K outputs, E hidden width, h w token grid, H W label size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from copernicus.datasets.sensors import InputError
from copernicus.models.initialise import fill_normal


class LinearHead(nn.Module):
    """Batch normalisation without affine parameters, then one Linear layer (MAE's linear probe, arXiv 2111.06377, A.1).

    Args:
        dim: width of the features.
        num_classes: number of outputs.
        seed: decides the initial weights (normal, std 0.01; bias 0); the global random state is not used.
    """

    def __init__(self, dim: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, affine=False, eps=1e-6)
        self.linear = skip_init(nn.Linear, dim, num_classes)
        fill_normal(self.linear.weight, 0.01, seed, "head.linear.weight")
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """Features (B, D), alone or as the only level of a list -> logits (B, K)."""
        z_BD = features if isinstance(features, Tensor) else features[0]
        return self.linear(self.norm(z_BD))


class DenseHead(nn.Module):
    """Maps from a few levels of patch tokens: 1x1 projection and batch norm each, sum, 3x3 and 1x1 convolution.

    Serves segmentation (K classes), regression (K = 1) and change detection (the caller subtracts the features of the
    two dates). Levels may differ in grid; all are brought to the finest one.

    Args:
        dims: width of each level, shallowest first.
        out_channels: number of outputs per pixel.
        hidden: width between the layers.
        seed: decides the initial weights; the global random state is not used.
    """

    def __init__(self, dims: Sequence[int], out_channels: int, hidden: int = 128, seed: int = 0) -> None:
        super().__init__()
        self.projections = nn.ModuleList(skip_init(nn.Conv2d, dim, hidden, kernel_size=1, bias=False) for dim in dims)
        # Levels are raw residual streams whose scales differ by an order of magnitude: each is normalised on its own.
        self.norms = nn.ModuleList(nn.BatchNorm2d(hidden) for _ in dims)
        self.mix = skip_init(nn.Conv2d, hidden, hidden, kernel_size=3, padding=1, bias=False)
        self.mix_norm = nn.BatchNorm2d(hidden)
        self.predict = skip_init(nn.Conv2d, hidden, out_channels, kernel_size=1)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 4:
                fan_in = parameter[0].numel()
                std = 0.01 if name.startswith("predict") else (2.0 / fan_in) ** 0.5  # He et al. 2015, before a ReLU
                fill_normal(parameter, std, seed, f"dense_head.{name}")
        nn.init.zeros_(self.predict.bias)

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
        """Levels, each (B, D, h, w) -> maps (B, K, H, W) where (H, W) is ``size``.

        Raises:
            InputError: not one level per entry of ``dims``.
        """
        if len(levels) != len(self.projections):
            raise InputError(f"dense head: built for {len(self.projections)} levels of features, got {len(levels)}")
        grid = max((tuple(level.shape[-2:]) for level in levels), key=lambda hw: hw[0] * hw[1])
        projected = []
        for level, projection, norm in zip(levels, self.projections, self.norms, strict=True):
            y_BEhw = norm(projection(level))
            if tuple(y_BEhw.shape[-2:]) != grid:
                y_BEhw = F.interpolate(y_BEhw, size=grid, mode="bilinear", align_corners=False)
            projected.append(y_BEhw)
        y_BEhw = F.relu(torch.stack(projected).sum(dim=0))
        y_BEhw = F.relu(self.mix_norm(self.mix(y_BEhw)))
        return F.interpolate(self.predict(y_BEhw), size=size, mode="bilinear", align_corners=False)
