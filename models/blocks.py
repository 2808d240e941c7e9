"""Transformer blocks, and batches of different lengths on their way through them.

Shapes: B batch, T tokens of a sequence, D width, h w token grid, N the tokens of several batches one after another.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from copernicus.datasets.sensors import InputError
from copernicus.models.attention import Groups, attend, group, pack, unpack


def check_sizes(dim: int, num_heads: int, depth: int, prefix: str = "", shallowest: int = 1) -> None:
    """Raises InputError for a transformer that cannot be built: of no width, or one that heads or positions do not divide."""
    for name, value, least in (("embed_dim", dim, 1), ("num_heads", num_heads, 1), ("depth", depth, shallowest)):
        if not isinstance(value, int) or value < least:
            raise InputError(f"{prefix}{name}={value} must be a whole number of at least {least}")
    if dim % 4 or dim % num_heads:
        raise InputError(f"{prefix}embed_dim={dim} must be a multiple of 4 and of {prefix}num_heads={num_heads}")


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, z_ND: Tensor, groups: Groups) -> Tensor:
        return self.proj(attend(self.qkv(z_ND), self.num_heads, groups))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, z_ND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(z_ND)))


class Block(nn.Module):
    """Pre-norm transformer block, MLP ratio 4."""

    def __init__(self, dim: int, num_heads: int, norm_eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, z_ND: Tensor, groups: Groups) -> Tensor:
        """Tokens of sequences that do not see each other -> the same after this block; see ``attention``."""
        z_ND = z_ND + self.attn(self.norm1(z_ND), groups)
        return z_ND + self.mlp(self.norm2(z_ND))


def run_blocks(blocks: nn.ModuleList, sequences: Sequence[Tensor], recompute: bool = False) -> list[Tensor]:
    """Batches of sequences (B, T, D), each with its own B and T, in one pass over the blocks.

    Every matrix product then sees the tokens of all batches, and every weight gets its gradient once.

    Args:
        recompute: keep a block's input alone for the backward pass (activation checkpointing).
    """
    z_ND, groups = pack(sequences), group(sequences)
    for block in blocks:
        z_ND = _run(block, z_ND, groups, recompute)
    return unpack(z_ND, sequences)


def through_blocks(
    blocks: nn.ModuleList, z_BTD: Tensor, grid: tuple[int, int], levels: Sequence[int] = (), recompute: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """A batch after the last block (B, T, D), and its patch tokens (B, D, h, w) after each block in levels.

    Raises:
        InputError: a level that is no block.
    """
    if missing := [level for level in levels if not 0 <= level < len(blocks)]:
        raise InputError(f"levels {missing} do not exist: the encoder has blocks 0..{len(blocks) - 1}")
    (z_ND, groups), taken = (pack([z_BTD]), group([z_BTD])), {}
    for number, block in enumerate(blocks):
        z_ND = _run(block, z_ND, groups, recompute)
        if number in levels:
            taken[number] = z_ND.unflatten(0, z_BTD.shape[:2])[:, 1:].transpose(1, 2).unflatten(2, grid)
    return z_ND.unflatten(0, z_BTD.shape[:2]), [taken[level] for level in levels]


def _run(block: nn.Module, z_ND: Tensor, groups: Groups, recompute: bool) -> Tensor:
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, z_ND, groups, use_reentrant=False)
    return block(z_ND, groups)


def default_levels(depth: int) -> tuple[int, ...]:
    """Blocks whose outputs feed dense decoders: the published ones for base and large, else four spread evenly."""
    if depth in (12, 24):
        return {12: (3, 5, 7, 11), 24: (7, 11, 15, 23)}[depth]
    count = min(4, depth)
    return tuple(round((i + 1) * depth / count) - 1 for i in range(count))
