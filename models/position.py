"""The fixed 2-d sine-cosine position table and its resizing. Shapes: D width, h w token grid, T = 1 + h*w."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from copernicus.models.derived import Derived


def sincos_table(dim: int, grid: int) -> Tensor:
    """Position table of a square token grid: (1, 1 + grid^2, D) float32; row 0, the class token's, is zero.

    The first half of the width encodes the column, the second the row, each as sines then cosines of the position
    times 10000^(-i / (D/4)) (MAE, arXiv 2111.06377, after Vaswani et al. 2017).
    """
    if dim % 4:
        raise ValueError(f"the width of a position table is a multiple of 4, not {dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    phase_GF = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    axis_GE = torch.cat([phase_GF.sin(), phase_GF.cos()], dim=1)
    column_hwE = axis_GE[None, :, :].expand(grid, grid, -1)
    row_hwE = axis_GE[:, None, :].expand(grid, grid, -1)
    table_hwD = torch.cat([column_hwE, row_hwE], dim=-1)
    return F.pad(table_hwD.reshape(1, grid * grid, dim), (0, 0, 1, 0)).float()


def resize_table(table_1TD: Tensor, grid: tuple[int, int]) -> Tensor:
    """The table for another token grid (h, w), square or not: bicubic with antialiasing; row 0 is kept."""
    side = math.isqrt(table_1TD.shape[1] - 1)
    if grid == (side, side):
        return table_1TD
    class_11D, patches_1LD = table_1TD[:, :1], table_1TD[:, 1:]
    image_1Dhw = patches_1LD.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image_1Dhw = F.interpolate(image_1Dhw, size=grid, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([class_11D, image_1Dhw.flatten(2).transpose(1, 2)], dim=1)


def fixed_positions(derived: Derived, table_1TD: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position table for a token grid. A frozen one is resized once for each grid."""
    if table_1TD.requires_grad or (grid[0] == grid[1] and table_1TD.shape[1] == 1 + grid[0] ** 2):
        return resize_table(table_1TD, grid)
    with torch.inference_mode(False):  # a table made in inference mode could not serve training later
        return derived.get(("positions", id(table_1TD), grid), [table_1TD], lambda: resize_table(table_1TD, grid))
