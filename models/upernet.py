"""The benchmark's head for dense tasks: a pyramid of four levels, UPerNet, and an auxiliary FCN head for training.

Sources: UPerNet (Xiao et al. 2018, arXiv 1807.10221), FCN (Long et al. 2015, arXiv 1411.4038), and for sizes, layers and
names of the parameters the modules of mmsegmentation 1.2.2 that Copernicus-Bench builds on: ``Feature2Pyramid`` (rescales
4, 2, 1, 0.5), ``UPerHead`` (512 channels, pools of 1, 2, 3, 6, dropout 0.1) and ``FCNHead`` (on the third level, 256
channels, one convolution). Weights start as theirs do there: He-normal by fan out before batch norms, torch's uniform
start elsewhere. Batch norm takes the place of synchronised batch norm.

Shapes: B batch, D feature width, E head width, K outputs, h w a level's grid, H W label size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from copernicus.datasets.sensors import InputError
from copernicus.models.initialise import fill_normal, generator

LEVELS = 4
POOL_SCALES = (1, 2, 3, 6)
AUX_LEVEL = 2
AUX_WEIGHT = 0.4
"""Of the auxiliary head's loss, beside 1 of the head's own."""
DROPOUT = 0.1


def pick_levels(count: int) -> tuple[int, ...]:
    """Which of an encoder's ``count`` levels become the pyramid's four: spread evenly, the last one last.

    Four are taken as they are; of more, some are left out (of 8: 1, 3, 5, 7); fewer are repeated (of 2: 0, 0, 1, 1).
    """
    return tuple(-(-(i + 1) * count // LEVELS) - 1 for i in range(LEVELS))


class KeyedDropout2d(nn.Module):
    """Drops whole channels while training; which ones depends on (seed, name, step) alone.

    Attributes:
        step: number of the training step; whoever trains sets it before each.
    """

    def __init__(self, p: float, seed: int, name: str) -> None:
        super().__init__()
        self.p, self.seed, self.name = p, seed, name
        self.step = 0

    def forward(self, y_BEhw: Tensor) -> Tensor:
        if not self.training:
            return y_BEhw
        drawn_BE = torch.rand(y_BEhw.shape[:2], generator=generator(self.seed, f"{self.name} dropout {self.step}"))
        scale_BE = (drawn_BE >= self.p) / (1 - self.p)
        return y_BEhw * scale_BE.to(y_BEhw)[:, :, None, None]


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1) -> None:
        super().__init__()
        self.conv = skip_init(nn.Conv2d, in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)

    def forward(self, y_BDhw: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(y_BDhw)))


class Feature2Pyramid(nn.Module):
    """Four levels of equal grids -> grids 4, 2, 1 and 0.5 times as fine."""

    def __init__(self, dims: Sequence[int]) -> None:
        super().__init__()
        self.upsample_4x = nn.Sequential(
            skip_init(nn.ConvTranspose2d, dims[0], dims[0], kernel_size=2, stride=2),
            nn.BatchNorm2d(dims[0]),
            nn.GELU(),
            skip_init(nn.ConvTranspose2d, dims[0], dims[0], kernel_size=2, stride=2),
        )
        self.upsample_2x = nn.Sequential(skip_init(nn.ConvTranspose2d, dims[1], dims[1], kernel_size=2, stride=2))

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        finest, fine, same, coarse = levels
        return [self.upsample_4x(finest), self.upsample_2x(fine), same, F.max_pool2d(coarse, kernel_size=2)]


class UPerHead(nn.Module):
    """Pyramid pooling on the coarsest level, a feature pyramid down to the finest, all of it fused there."""

    def __init__(self, dims: Sequence[int], channels: int, out_channels: int, seed: int) -> None:
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(dims[-1], channels)) for scale in POOL_SCALES
        )
        self.bottleneck = ConvModule(dims[-1] + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(dim, channels) for dim in dims[:-1])
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in dims[:-1])
        self.fpn_bottleneck = ConvModule(len(dims) * channels, channels, 3)
        self.dropout = KeyedDropout2d(DROPOUT, seed, "decoder")
        self.conv_seg = skip_init(nn.Conv2d, channels, out_channels, kernel_size=1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        coarsest = levels[-1]
        pooled = [resize(pool(coarsest), coarsest) for pool in self.psp_modules]
        y_BEhw = self.bottleneck(torch.cat([coarsest, *pooled], dim=1))
        laterals = [y_BEhw]
        for level, convolve in zip(reversed(levels[:-1]), reversed(self.lateral_convs), strict=True):
            lateral = convolve(level)
            laterals.insert(0, lateral + resize(laterals[0], lateral))
        outputs = [convolve(lateral) for convolve, lateral in zip(self.fpn_convs, laterals[:-1], strict=True)]
        outputs.append(laterals[-1])
        fused = torch.cat([outputs[0], *(resize(output, outputs[0]) for output in outputs[1:])], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(fused)))


class FCNHead(nn.Module):
    """One 3x3 convolution, then the outputs."""

    def __init__(self, dim: int, channels: int, out_channels: int, seed: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvModule(dim, channels, 3))
        self.dropout = KeyedDropout2d(DROPOUT, seed, "aux_head")
        self.conv_seg = skip_init(nn.Conv2d, channels, out_channels, kernel_size=1)

    def forward(self, y_BDhw: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(y_BDhw)))


class UPerNet(nn.Module):
    """Maps from an encoder's levels, with the auxiliary maps beside them while training.

    Args:
        dims: width of each of the encoder's levels, shallowest first; see ``pick_levels``.
        out_channels: number K of outputs per pixel.
        channels: width E of the head; the auxiliary one has half of it.
        seed: decides initial weights and dropout; the global random state is not used.

    Raises:
        InputError: no level, or a head of no width.
    """

    def __init__(self, dims: Sequence[int], out_channels: int, channels: int = 512, seed: int = 0) -> None:
        super().__init__()
        if not dims or channels < 2:
            raise InputError(f"UPerNet: {len(dims)} levels and {channels} channels; it needs a level and 2 channels")
        self.count = len(dims)
        self.levels = pick_levels(len(dims))
        picked = [dims[level] for level in self.levels]
        self.neck = Feature2Pyramid(picked)
        self.decoder = UPerHead(picked, channels, out_channels, seed)
        self.aux_head = FCNHead(picked[AUX_LEVEL], channels // 2, out_channels, seed)
        _fill(self, seed)

    def forward(self, levels: Sequence[Tensor], size: tuple[int, int]) -> Tensor | tuple[Tensor, Tensor]:
        """Levels, each (B, D, h, w) -> maps (B, K, H, W) where (H, W) is ``size``; while training, the auxiliary too.

        Raises:
            InputError: not one level per entry of ``dims``, or a grid that cannot be halved.
        """
        if len(levels) != self.count:
            raise InputError(f"UPerNet: built for {self.count} levels of features, got {len(levels)}")
        picked = [levels[level] for level in self.levels]
        if min(picked[-1].shape[-2:]) < 2:
            raise InputError(
                f"UPerNet: a grid of {tuple(picked[-1].shape[-2:])} tokens cannot be halved; "
                "give larger images, or the light head"
            )
        pyramid = self.neck(picked)
        y_BKHW = _enlarge(self.decoder(pyramid), size)
        if not self.training:
            return y_BKHW
        return y_BKHW, _enlarge(self.aux_head(pyramid[AUX_LEVEL]), size)


def resize(y_BEhw: Tensor, like: Tensor) -> Tensor:
    """Bilinear, to the grid of another level."""
    return _enlarge(y_BEhw, (like.shape[-2], like.shape[-1]))


def _enlarge(y_BKhw: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(y_BKhw.shape[-2:]) == tuple(size):
        return y_BKhw
    return F.interpolate(y_BKhw, size=size, mode="bilinear", align_corners=False)


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    for name, module in model.named_modules():
        if not isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            continue
        key, weight = f"upernet.{name}.weight", module.weight
        if module.bias is None:  # a batch norm follows: He et al. 2015, by fan out, as mmcv's ConvModule starts
            fill_normal(weight, (2.0 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5, seed, key)
        else:  # torch's own start
            bound = weight[0].numel() ** -0.5
            weight.uniform_(-bound, bound, generator=generator(seed, key))
            module.bias.uniform_(-bound, bound, generator=generator(seed, f"upernet.{name}.bias"))
